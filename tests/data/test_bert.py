"""BERT's samples: pairs of texts from the right documents, with the right tokens hidden, whatever is read before."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from megatron.data.bert import BertDataset, PairRequest, truncated
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.masking import MaskedTokens, choose_tokens
from megatron.data.sample import PairSample
from megatron.errors import ConfigError, DataError
from megatron.tokenizer.null import NullTokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron.tokenizer.wordpiece import BertWordPieceLowerCase, word_continuations
from tiny_tokenizers import write_sentencepiece, write_wordpiece

NUM_DOCUMENTS, SEQ_LENGTH = 40, 64
CLS, SEP, MASK, PAD = 30_000, 30_001, 30_002, 30_003
SPECIAL = MaskedTokens(CLS, SEP, MASK, PAD, vocab_size=30_004)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token 500 * d + i is the i-th of document d: a window of text shows where it is from."""
    prefix, draw = tmp_path_factory.mktemp("data") / "sentences", random.Random(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for document in range(NUM_DOCUMENTS):
            first = 500 * document
            for length in (draw.randint(1, 20) for _ in range(draw.randint(1, 20))):
                writer.add_item(np.arange(first, first + length))
                first += length
            writer.end_document()
    return prefix


def dataset(prefix: Path, special: MaskedTokens = SPECIAL, **changes: object) -> BertDataset:
    request = PairRequest(range(NUM_DOCUMENTS), num_samples=2000, sequence_length=SEQ_LENGTH, seed=3)
    return BertDataset(IndexedDataset(prefix), replace(request, **changes), special)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def samples(sentences: Path) -> list[PairSample]:
    opened = dataset(sentences)
    return [opened[i] for i in range(len(opened))]


def texts_of(sample: PairSample) -> tuple[np.ndarray, np.ndarray]:
    """Both texts as they were, found by the special tokens."""
    length = int((sample.segment_ids == 0).sum())
    labels = sample.labels[:length]
    (first_end, second_end) = np.flatnonzero(labels == SEP)
    assert labels[0] == CLS and second_end == length - 1
    return labels[1:first_end], labels[first_end + 1 : second_end]


def test_a_sample_is_two_texts_between_special_tokens_and_padding(samples: list[PairSample]):
    for sample in samples:
        first, second = texts_of(sample)
        length = len(first) + len(second) + 3
        assert min(len(first), len(second)) >= 1 and length <= SEQ_LENGTH
        assert sample.token_types.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (64 - length)
        assert (sample.labels[length:] == PAD).all() and (sample.tokens[length:] == PAD).all()
        assert (sample.segment_ids == (np.arange(SEQ_LENGTH) >= length)).all()


def test_texts_are_whole_runs_of_one_document_and_follow_each_other_or_are_from_two(samples: list[PairSample]):
    for sample in samples:
        first, second = texts_of(sample)
        for text in (first, second):
            assert (np.diff(text) == 1).all() and text[0] // 500 == text[-1] // 500
        if sample.is_random:
            assert first[0] // 500 != second[0] // 500
        else:
            assert first[0] // 500 == second[0] // 500 and first[-1] < second[0]
    untruncated = [texts_of(s) for s in samples if not s.is_random and (s.segment_ids == 0).sum() < 20]
    assert any(second[0] == first[-1] + 1 for first, second in untruncated)


def test_texts_from_elsewhere_come_from_every_sentence_of_the_other_documents_alike(sentences: Path):
    opened, indexed = dataset(sentences), IndexedDataset(sentences)
    draws = (np.arange(20_000) + 0.5) / 20_000
    own_start, own_stop = indexed.document_indices[[7, 8]].tolist()
    found = {int(opened._elsewhere(own_start, 1, draw)[0]) for draw in draws}
    starts = [int(indexed.get(i)[0]) for i in range(len(indexed))]
    assert found == {*starts[:own_start], *starts[own_stop:]}


def test_labels_restore_the_text_and_only_chosen_tokens_are_changed(samples: list[PairSample]):
    for sample in samples:
        is_counted = sample.loss_mask == 1
        assert ((sample.loss_mask == 0) | is_counted).all()
        assert (sample.tokens == sample.labels)[~is_counted].all()
        assert not np.isin(sample.labels[is_counted], [CLS, SEP, MASK, PAD]).any()


def test_tokens_are_hidden_replaced_and_left_at_the_rates_of_the_paper(samples: list[PairSample]):
    chosen = [(s.tokens[s.loss_mask == 1], s.labels[s.loss_mask == 1]) for s in samples]
    num_texts = np.array([sum(map(len, texts_of(s))) for s in samples])
    assert [len(tokens) for tokens, _ in chosen] == [max(1, math.floor(0.15 * n + 0.5)) for n in num_texts]
    tokens, labels = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
    five_sigma = 5 * 0.5 / math.sqrt(len(tokens))
    assert (tokens == MASK).mean() == pytest.approx(0.8, abs=five_sigma)
    assert (tokens == labels).mean() == pytest.approx(0.1, abs=five_sigma)
    replaced = tokens[(tokens != MASK) & (tokens != labels)]
    assert replaced.min() >= 0 and replaced.max() < SPECIAL.vocab_size
    assert replaced.mean() == pytest.approx(15_002, abs=5 * 30_004 / math.sqrt(12 * len(replaced)))


def test_every_position_of_a_text_is_as_likely_to_be_chosen():
    counts, draw = np.zeros(40), np.random.default_rng(0)
    for _ in range(4000):
        counts += choose_tokens(np.ones(40, dtype=bool), 0.15, draw.random(40))
    assert counts == pytest.approx(np.full(40, 600), abs=5 * math.sqrt(4000 * 0.15 * 0.85))


def test_half_of_the_pairs_do_not_follow(samples: list[PairSample]):
    assert np.mean([s.is_random for s in samples]) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(len(samples)))


def assert_same(one: PairSample, other: PairSample) -> None:
    for field in fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name


def test_a_sample_is_a_function_of_seed_and_number_alone(sentences: Path, samples: list[PairSample]):
    again = dataset(sentences)
    for number in (1999, 0, 7, 7):
        assert_same(again[number], samples[number])
    fewer = dataset(sentences, num_samples=10)
    assert fewer.has_same_order_for(2000)
    for number in range(10):
        assert_same(fewer[number], samples[number])
    other = dataset(sentences, seed=4)
    assert any(not np.array_equal(other[i].labels, samples[i].labels) for i in range(3))


def test_every_epoch_has_other_pairs_and_other_masks(sentences: Path):
    opened, size = dataset(sentences), len(dataset(sentences, num_samples=1))
    first = {tuple(row) for row in opened.pair_index[:size].tolist()}
    second = {tuple(row) for row in opened.pair_index[size : 2 * size].tolist()}
    assert len(first - second) > size / 2


def test_runs_of_other_lengths_share_their_index(sentences: Path):
    cache = sentences.parent / "cache"
    one = dataset(sentences, seed=11, num_samples=1)
    before = set(cache.iterdir())
    assert len(dataset(sentences, seed=11, num_samples=len(one))) == len(one) == one.samples_per_epoch
    assert set(cache.iterdir()) == before
    assert len(dataset(sentences, seed=11, num_samples=5 * len(one))) >= 5 * len(one)


def test_samples_stay_inside_their_range_of_documents(sentences: Path):
    opened = dataset(sentences, documents=range(10, 14), num_samples=300)
    for i in range(300):
        assert all(10 <= text[0] // 500 < 14 for text in texts_of(opened[i]))


def test_truncation_shortens_the_longer_text_first():
    draw = random.Random(1)
    for _ in range(300):
        sizes, most = [draw.randint(1, 30), draw.randint(1, 30)], draw.randint(2, 40)
        texts = np.arange(sizes[0]), np.arange(sizes[1])
        while sum(sizes) > most:
            sizes[0 if sizes[0] > sizes[1] else 1] -= 1
        windows = truncated(*texts, most, draw.random(), draw.random())
        assert [len(window) for window in windows] == sizes
        assert all((np.diff(window) == 1).all() for window in windows)


def test_words_are_chosen_whole():
    starts = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0, 0], dtype=bool)
    word, draw = np.cumsum(starts) - 1, np.random.default_rng(2)
    for _ in range(200):
        chosen = choose_tokens(starts, 0.4, draw.random(10))
        assert all(chosen[word == number].all() or not chosen[word == number].any() for number in range(5))
        assert chosen.sum() == 4
    assert choose_tokens(np.array([True, False, False] * 3), 0.5, draw.random(9)).sum() == 3, "no word fits any more"
    assert choose_tokens(np.array([True, False, False]), 0.15, draw.random(3)).all(), "the only word"
    assert choose_tokens(np.zeros(0, dtype=bool), 0.15, draw.random(0)).shape == (0,)


def test_a_word_that_truncation_has_cut_is_still_one(sentences: Path):
    """All of document 3's tokens continue words, so each of its texts is one word: hidden whole or not at all."""
    continues = np.zeros(30_004, dtype=bool)
    continues[1500:2000] = True
    opened = dataset(sentences, replace(SPECIAL, continues=continues), mask_prob=0.9, documents=range(3, 6))
    seen = 0
    for i in range(100):
        sample = opened[i]
        for kind in (0, 1):
            own = (sample.labels // 500 == 3) & (sample.token_types == kind)
            seen += own.any()
            assert sample.loss_mask[own].all() or not sample.loss_mask[own].any()
    assert seen > 20


def test_the_tokens_that_samples_are_made_of_come_from_the_tokenizer(tmp_path: Path):
    tokenizer = BertWordPieceLowerCase(write_wordpiece(Path(), tmp_path))
    special = MaskedTokens.of(tokenizer)
    assert (special.pad, special.cls, special.sep, special.mask) == (0, 2, 3, 4)
    assert special.continues is not None
    pieces = (tmp_path / "vocab.txt").read_text().splitlines()
    assert [piece for piece, inside in zip(pieces, special.continues, strict=True) if inside] == [
        piece for piece in pieces if piece.startswith("##")
    ]
    sentencepiece = SentencePieceTokenizer(write_sentencepiece(tmp_path))
    assert MaskedTokens.of(sentencepiece).mask == sentencepiece.mask is not None
    assert word_continuations(sentencepiece) is None


def test_a_tokenizer_without_them_is_refused():
    with pytest.raises(ConfigError) as caught:
        MaskedTokens.of(NullTokenizer(10))
    assert str(caught.value) == (
        "--tokenizer_type NullTokenizer has no cls and no sep and no mask and no pad token, which BERT's samples are "
        "made of; use BertWordPieceLowerCase or BertWordPieceCase, or a SentencePieceTokenizer without --no_new_tokens."
    )


def test_other_bounds_of_documents_or_flags_are_other_samples(tmp_path: Path):
    """The same sentences in other documents: the tokens and lengths are equal, and the cache must not be."""
    built = []
    for name, ends in (("one", (2, 4)), ("two", (1, 4))):
        with IndexedDatasetWriter(tmp_path / name, "uint16") as writer:
            for i in range(4):
                writer.add_item(np.arange(5 * i, 5 * i + 5))
                if i + 1 in ends:
                    writer.end_document()
        built.append(dataset(tmp_path / name, documents=range(2), num_samples=9).pair_index)
    assert not np.array_equal(*[pairs[:4] for pairs in built])
    shorter = dataset(tmp_path / "one", documents=range(2), num_samples=9, sequence_length=20).pair_index
    assert shorter[:, 3].max() == 17


def test_data_that_has_no_pairs_is_refused(tmp_path: Path):
    with IndexedDatasetWriter(tmp_path / "whole", "uint16") as writer:
        for _ in range(3):
            writer.add_document([1, 2, 3])
    with pytest.raises(DataError, match=r"whole: none of documents 0 to 3 has two sentences.*--split_sentences"):
        dataset(tmp_path / "whole", documents=range(3))
    with IndexedDatasetWriter(tmp_path / "single", "uint16") as writer:
        writer.add_document([1, 2, 3, 4], [2, 2])
        writer.end_document()
    with pytest.raises(DataError, match=r"single: of documents 0 to 2, at most one has sentences, and half.*--split"):
        dataset(tmp_path / "single", documents=range(2))
    with IndexedDatasetWriter(tmp_path / "roles", "uint16", has_documents=False) as writer:
        writer.add_item([1, 2])
    with pytest.raises(DataError, match=r"roles: has 0 documents of sentences, and documents 0 to 1 are wanted"):
        dataset(tmp_path / "roles", documents=range(1))
