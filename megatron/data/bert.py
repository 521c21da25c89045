"""BERT's samples: two texts, the second of which follows the first or comes from elsewhere, with tokens to restore.

A sample is a function of the seed and its number alone. What is stored is where the texts of each begin and end; words
to hide and texts from elsewhere are drawn when a sample is read.

Legend: s sequence length, n tokens of both texts.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron.data import helpers
from megatron.data.draws import stream, uniforms
from megatron.data.index_cache import Arrays, cached_arrays
from megatron.data.index_file import CHUNK_SEQUENCES
from megatron.data.indexed import IndexedDataset, default_cache_path
from megatron.data.masking import MaskedTokens, choose_tokens, hide
from megatron.data.sample import PairSample
from megatron.errors import DataError

# Part of every cache key: raise it when the meaning of the stored index changes.
PAIR_CODE_VERSION = 1
NUM_SPECIAL = 3  # [CLS] first [SEP] second [SEP]
MIN_PAIR_LENGTH = NUM_SPECIAL + 2
_EPOCHS, _SAMPLES = range(2)  # the streams of a seed


@dataclass(frozen=True)
class PairRequest:
    """What is wanted of sentences: everything that the samples depend on, besides the data.

    `documents` are those of the file that are read. Each epoch's samples are shuffled on their own, so that the order
    does not depend on `num_samples`.
    """

    documents: range
    num_samples: int
    sequence_length: int
    seed: int
    mask_prob: float = 0.15
    short_seq_prob: float = 0.1

    @property
    def max_tokens(self) -> int:
        return self.sequence_length - NUM_SPECIAL


class BertDataset:
    """Samples of two texts from documents of sentences: ``[CLS] first [SEP] second [SEP]`` and padding.

    The texts are neighbours in one document, or, of every second sample, the second is from another document of the
    same range. Raises DataError where there are no two sentences, or no other document.
    """

    def __init__(
        self, indexed: IndexedDataset, request: PairRequest, special: MaskedTokens, cache_path: Path | None = None
    ):
        self._indexed, self._request, self._special = indexed, request, special
        key: dict[str, str | int] = {
            "version": PAIR_CODE_VERSION,
            "data": indexed.fingerprint,
            "documents": f"{request.documents.start}:{request.documents.stop}",
            "boundaries": _boundaries_digest(indexed),
            "max_tokens": request.max_tokens,
            "short_seq_prob": repr(request.short_seq_prob),
            "seed": request.seed,
        }
        folder = cache_path if cache_path is not None else default_cache_path(indexed.prefix)

        def index(num_epochs: int) -> np.ndarray:
            build = partial(_build, indexed, request, num_epochs)
            return cached_arrays(folder, "bert", {**key, "num_epochs": num_epochs}, build)["pair_index"]

        # Runs of other lengths find the same index again.
        self.pair_index = index(1)
        self.samples_per_epoch = len(self.pair_index)
        """Of the first epoch; others have a few more or less."""
        num_epochs = -(-request.num_samples // self.samples_per_epoch)
        while len(self.pair_index) < request.num_samples:
            self.pair_index = index(num_epochs)
            num_epochs += 1
        self._samples_key = stream(request.seed, _SAMPLES)

    def __len__(self) -> int:
        return len(self.pair_index)

    def has_same_order_for(self, num_samples: int | None) -> bool:
        """Always: fewer samples are the first of more."""
        return num_samples is not None

    def __getitem__(self, index: int) -> PairSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)}")
        size = self._request.sequence_length
        draws = uniforms(stream(self._samples_key, index), NUM_SPECIAL + 3 * size)
        where, draws = draws[:NUM_SPECIAL], draws[NUM_SPECIAL:].reshape(3, size)
        start, middle, stop, target = self.pair_index[index].tolist()
        first = self._read(start, middle)
        second = self._read(middle, stop) if stop > middle else self._elsewhere(start, target - len(first), where[0])
        texts = truncated(first, second, target, where[1], where[2])
        return self._sample(*texts, draws, is_random=stop == middle)

    def _sample(self, first: np.ndarray, second: np.ndarray, draws: np.ndarray, *, is_random: bool) -> PairSample:
        """draws: float64 [3, s]."""
        special, size = self._special, self._request.sequence_length
        length = len(first) + len(second) + NUM_SPECIAL
        begins_second = len(first) + 2
        labels = np.full(size, special.pad, dtype=np.int64)
        labels[0], labels[begins_second - 1], labels[length - 1] = special.cls, special.sep, special.sep
        labels[1 : begins_second - 1], labels[begins_second : length - 1] = first, second
        is_text = np.zeros(size, dtype=bool)
        is_text[1 : begins_second - 1] = is_text[begins_second : length - 1] = True

        chosen = np.zeros(size, dtype=bool)
        starts = np.concatenate([self._word_starts(first), self._word_starts(second)])
        chosen[is_text] = choose_tokens(starts, self._request.mask_prob, draws[0])
        position = np.arange(size)
        return PairSample(
            tokens=hide(labels, chosen, special, draws[1:]),
            labels=labels,
            loss_mask=chosen.astype(np.float32),
            token_types=((position >= begins_second) & (position < length)).astype(np.int64),
            segment_ids=(position >= length).astype(np.int32),
            is_random=is_random,
        )

    def _word_starts(self, text: np.ndarray) -> np.ndarray:
        """bool [n]; the first token of a text starts a word, also where truncation has cut it."""
        if self._special.continues is None:
            return np.ones(len(text), dtype=bool)
        starts = ~self._special.continues[text]
        starts[:1] = True
        return starts

    def _read(self, start: int, stop: int) -> np.ndarray:
        """The tokens of sentences `start` to `stop`: int64."""
        lengths = self._indexed.sequence_lengths[start:stop]
        sequences = np.arange(start, stop, dtype=np.int32)
        tokens, _, _ = self._indexed.read_span(sequences, 0, int(lengths[-1]), int(lengths.sum(dtype=np.int64)))
        return tokens

    def _elsewhere(self, start: int, room: int, draw: float) -> np.ndarray:
        """A text of about `room` tokens, of at least one sentence, from another document than that of `start`.

        It begins at any sentence, each as likely as another: where a text comes from says nothing about its document.
        """
        bounds, documents = self._indexed.document_indices, self._request.documents
        own = bisect_right(bounds, start, documents.start, documents.stop) - 1
        own_start, own_stop = int(bounds[own]), int(bounds[own + 1])
        first, last = int(bounds[documents.start]), int(bounds[documents.stop])
        begin = first + int(draw * (last - first - (own_stop - own_start)))
        if begin >= own_start:
            begin += own_stop - own_start
        end = int(bounds[bisect_right(bounds, begin, documents.start, documents.stop)])
        stop, lengths = begin + 1, self._indexed.sequence_lengths
        num_tokens = int(lengths[begin])
        while stop < end and num_tokens < room:
            num_tokens += int(lengths[stop])
            stop += 1
        return self._read(begin, stop)


def truncated(
    first: np.ndarray, second: np.ndarray, max_tokens: int, first_draw: float, second_draw: float
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of both texts, together of at most `max_tokens`: the longer one is shortened, then both alike.

    Where a window lies is drawn, so that the model also sees texts whose beginning is missing.
    """
    keep_first = min(len(first), max(max_tokens - len(second), (max_tokens + 1) // 2))
    keep_second = min(len(second), max_tokens - keep_first)
    return _window(first, keep_first, first_draw), _window(second, keep_second, second_draw)


def _window(text: np.ndarray, size: int, draw: float) -> np.ndarray:
    start = int(draw * (len(text) - size + 1))
    return text[start : start + size]


def _build(indexed: IndexedDataset, request: PairRequest, num_epochs: int) -> Arrays:
    """Whole epochs: int32 [samples, 4], the rows of `build_pair_index`."""
    _check_documents(indexed, request.documents)
    epochs = [_epoch(indexed, request, epoch) for epoch in range(num_epochs)]
    if not len(epochs[0]):
        raise DataError(
            f"{indexed.prefix}: none of documents {request.documents.start} to {request.documents.stop} has two "
            "sentences, and BERT learns from pairs of them; preprocess the text with --split_sentences."
        )
    return {"pair_index": np.concatenate(epochs)}


def _epoch(indexed: IndexedDataset, request: PairRequest, epoch: int) -> np.ndarray:
    """Every epoch cuts the documents into other pairs."""
    key = stream(stream(request.seed, _EPOCHS), epoch)
    pairs = helpers.build_pair_index(
        indexed.sequence_lengths,
        indexed.document_indices,
        first=request.documents.start,
        last=request.documents.stop,
        max_tokens=request.max_tokens,
        short_probability=request.short_seq_prob,
        key=key,
    )
    # numpy promises that the legacy generator never draws otherwise.
    return pairs[np.random.RandomState([key >> 32, key & 0xFFFFFFFF]).permutation(len(pairs))]


def _check_documents(indexed: IndexedDataset, documents: range) -> None:
    if len(indexed.document_indices) == 1 or documents.stop > indexed.num_documents:
        raise DataError(
            f"{indexed.prefix}: has {len(indexed.document_indices) - 1} documents of sentences, and documents "
            f"{documents.start} to {documents.stop} are wanted; preprocess the text with --split_sentences."
        )
    bounds = indexed.document_indices[documents.start : documents.stop + 1]
    if np.count_nonzero(np.diff(bounds)) < 2:
        raise DataError(
            f"{indexed.prefix}: of documents {documents.start} to {documents.stop}, at most one has sentences, "
            "and half of BERT's second texts come from another; use more data or another --split."
        )


def _boundaries_digest(indexed: IndexedDataset) -> str:
    """The documents' bounds, which the fingerprint of the data leaves out."""
    digest = hashlib.sha256()
    for start in range(0, len(indexed.document_indices), CHUNK_SEQUENCES):
        digest.update(indexed.document_indices[start : start + CHUNK_SEQUENCES].tobytes())
    return digest.hexdigest()
