"""Documents of sentences are cut into pairs of texts, in C++ as in the oracle below."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from megatron.data import helpers
from megatron.data.draws import stream, uniforms

WORD = 2**64


def splitmix64(state: int) -> list[float]:
    """Its first numbers in [0, 1), as published."""
    drawn = []
    for _ in range(2000):
        state = (state + 0x9E3779B97F4A7C15) % WORD
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        drawn.append(((z ^ (z >> 31)) >> 11) / 2**53)
    return drawn


def oracle(
    lengths: list[int], bounds: list[int], documents: range, max_tokens: int, short: float, key: int
) -> list[list[int]]:
    rows = []
    for document in documents:
        draws = iter(splitmix64(stream(key, document)))
        start, end = bounds[document], bounds[document + 1]
        while end - start > 1:
            target = max_tokens
            if next(draws) < short:
                target = 2 + math.floor(next(draws) * (max_tokens - 1))
            stop = start + 2
            while stop < end and sum(lengths[start:stop]) < target:
                stop += 1
            if stop == end - 1:
                stop = end
            middle = start + 1 + math.floor(next(draws) * (stop - start - 1))
            follows = next(draws) >= 0.5
            rows.append([start, middle, stop if follows else middle, target])
            start = stop if follows else middle
    return rows


def corpus(seed: int, num_documents: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of sentences, some empty, and bounds of documents, some of no or one sentence."""
    draw = random.Random(seed)
    counts = [draw.choice([0, 1, 2, 3, draw.randrange(40)]) for _ in range(num_documents)]
    lengths = [draw.choice([0, 1, draw.randrange(60)]) for _ in range(sum(counts))]
    return np.array(lengths, dtype=np.int32), np.cumsum([0, *counts], dtype=np.int64)


def build(lengths: np.ndarray, bounds: np.ndarray, documents: range, *, short: float = 0.1, key: int = 5) -> np.ndarray:
    return helpers.build_pair_index(
        lengths,
        bounds,
        first=documents.start,
        last=documents.stop,
        max_tokens=61,
        short_probability=short,
        key=key,
    )


@pytest.mark.parametrize("seed", range(20))
def test_pairs_equal_the_oracle(seed):
    (lengths, bounds), key = corpus(seed), stream(seed, 1)
    documents = range(seed % 5, len(bounds) - 1 - seed % 7)
    pairs = build(lengths, bounds, documents, short=seed % 3 / 4, key=key)
    expected = oracle(lengths.tolist(), bounds.tolist(), documents, 61, seed % 3 / 4, key)
    assert pairs.dtype == np.int32 and pairs.tolist() == expected


def test_draws_are_those_of_splitmix64():
    for key in (0, 1, 2**64 - 1, stream(7, 3)):
        assert uniforms(key, 2000).tolist() == splitmix64(key)


def test_pairs_lie_in_one_document_and_no_sentence_is_in_two_of_them():
    lengths, bounds = corpus(1, num_documents=500)
    pairs = build(lengths, bounds, range(500))
    document = np.searchsorted(bounds, pairs[:, 0], side="right") - 1
    assert (pairs[:, 0] < pairs[:, 1]).all() and (pairs[:, 1] <= pairs[:, 2]).all()
    assert (pairs[:, 2] <= bounds[document + 1]).all()
    assert (pairs[:-1, 2] <= pairs[1:, 0]).all()


def test_only_single_sentences_are_left_out():
    """One at the end of a document whose last pair has its second text from elsewhere, and documents of one."""
    lengths, bounds = corpus(2, num_documents=300)
    pairs = build(lengths, bounds, range(300))
    is_read = np.zeros(len(lengths), dtype=bool)
    for start, _, stop, _ in pairs.tolist():
        is_read[start:stop] = True
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert is_read[start : max(start, end - 1)].all()


def test_half_of_the_second_texts_are_from_elsewhere_and_a_tenth_of_the_samples_is_short():
    lengths, bounds = np.full(200_000, 10, dtype=np.int32), np.arange(0, 200_001, 100, dtype=np.int64)
    pairs = build(lengths, bounds, range(2000))
    five_sigma = 5 * 0.5 / math.sqrt(len(pairs))
    assert (pairs[:, 1] == pairs[:, 2]).mean() == pytest.approx(0.5, abs=five_sigma)
    assert (pairs[:, 3] < 61).mean() == pytest.approx(0.1 * 59 / 60, abs=five_sigma)
    assert pairs[:, 3].min() == 2 and pairs[:, 3].max() == 61


def test_input_that_contradicts_itself_is_refused():
    lengths, bounds = np.full(4, 5, dtype=np.int32), np.array([0, 2, 4], dtype=np.int64)
    with pytest.raises(ValueError, match="documents 0 to 3 of 2, 4 sentences, 61 tokens"):
        build(lengths, bounds, range(3))
    with pytest.raises(IndexError, match="document 1 is sequences 2 to 9 of 4"):
        build(lengths, np.array([0, 2, 9], dtype=np.int64), range(2))
    with pytest.raises(ValueError, match="lengths must be int32, not int64"):
        build(lengths.astype(np.int64), bounds, range(2))
