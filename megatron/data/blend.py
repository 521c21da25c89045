"""Several datasets served in shares: ``--data_path 0.7 web 0.3 code``, exact at every prefix.

The rule is Megatron-LM's: each time the dataset is served that is furthest behind its share. So is the order inside a
dataset that is planned for as many samples; the order of a blend may differ in places. Megatron-LM rounds the shares
otherwise (it divides the weights by their sum twice), and plans each dataset for some more samples than its share
(0.5 %, rounded up), which may be an epoch more; here each is planned for exactly the samples that it serves.

What is stored is one entry of the index cache for the whole blend, found again by the files' identities alone, so that
a start with hundreds of datasets opens none of them; each is opened when its first sample is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron.data import helpers
from megatron.data.data_file import DataFile, require_files
from megatron.data.fim import FillInMiddle
from megatron.data.gpt import INDEX_CODE_VERSION, DocumentBounds, GPTSamples, IndexRequest, count_tokens
from megatron.data.gpt_index import plan_epochs
from megatron.data.index_cache import Arrays, EntryWriter, cached_entry
from megatron.data.index_file import HEADER, announced_sequences
from megatron.data.indexed import IndexedDataset, name_of
from megatron.data.object_store import ObjectStore
from megatron.data.pieces import Piece
from megatron.data.sample import Sample
from megatron.data.source import check_vocabulary
from megatron.errors import ConfigError, DataError

_BLEND_CODE_VERSION = 2
_UNLIMITED = 2**62
_NAME = re.compile(r"[A-Za-z]\w*")
_PARTS = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True)
class Blend:
    """`paths` as typed; `weights` are positive and need not add up to 1, None: by the number of tokens."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def parse_blend(flag: str, values: Sequence[str]) -> Blend:
    """``w1 p1 w2 p2 ...``, or paths alone. Raises ConfigError naming the value that is neither."""
    numbers = [_number(value) for value in values]
    if all(number is None for number in numbers):
        return Blend(tuple(values))
    if len(values) % 2 or any((number is None) != bool(i % 2) for i, number in enumerate(numbers)):
        raise ConfigError(
            f"{flag} {' '.join(values)} is neither paths nor weights and paths in turns; give {flag} PATH [PATH ...] "
            f"or {flag} WEIGHT PATH [WEIGHT PATH ...]."
        )
    weights = [number for number in numbers if number is not None]
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ConfigError(f"{flag} {' '.join(values)}: weight {weight:g} is no share; give a positive number.")
    return Blend(tuple(values[1::2]), tuple(weights))


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def parse_named_blends(flag: str, values: Sequence[str], default_name: str) -> dict[str, Blend]:
    """``name=path name=path ...``, where a path may be ``w1,p1,w2,p2``; or one blend, called `default_name`."""
    pairs = [value.partition("=") for value in values]
    if not any(_NAME.fullmatch(name) and separator for name, separator, _ in pairs):
        return {default_name: parse_blend(flag, values)} if values else {}
    wrong = [
        value for value, (name, _, path) in zip(values, pairs, strict=True) if not (_NAME.fullmatch(name) and path)
    ]
    names = [name for name, _, _ in pairs]
    if wrong or len(set(names)) < len(names):
        raise ConfigError(
            f"{flag} {' '.join(values)}: {wrong[0] if wrong else max(names, key=names.count)!r} is no NAME=PATH with a "
            "name of its own; give every set a name, or none."
        )
    return {name: parse_blend(flag, path.split(",")) for name, _, path in pairs}


@dataclass(frozen=True)
class Member:
    """One dataset of a blend, to be opened when that is needed."""

    prefix: str | os.PathLike[str]
    open: Callable[[], IndexedDataset]
    store: ObjectStore = field(default_factory=ObjectStore)

    @cached_property
    def identity(self) -> str:
        """Name, size and version of both files: a copy is another dataset to this, but another dataset never the same.

        Raises DataError where one is missing.
        """
        return "; ".join(file.identity for file in self._files)

    def count_sequences(self) -> int:
        """The number of sequences, from the header alone where that is sound."""
        count = announced_sequences(self._files[0].head(HEADER.size))
        return len(self.open()) if count is None else count

    @cached_property
    def _files(self) -> tuple[DataFile, DataFile]:
        return require_files(name_of(self.prefix), self.store)


@dataclass(frozen=True)
class Request:
    """What is wanted of a blend: everything its order depends on, besides the data.

    `documents` gives a dataset's documents from their number: all, or one split's share. `documents_key` names that
    function in the cache. `max_epochs` limits how often each dataset is read; the others then share what is left.
    `vocab_size` is what the ids of every dataset are compared with when the blend is built.
    """

    num_samples: int
    sequence_length: int
    seed: int
    documents: Callable[[int], range]
    documents_key: str
    vocab_size: int
    weights: tuple[float, ...] | None = None
    max_epochs: float | None = None


class BlendedDataset:
    """Sample k comes from dataset `dataset_index[k]` and is number `position_index[k]` there."""

    def __init__(
        self,
        members: Sequence[Member],
        request: Request,
        bounds: DocumentBounds,
        cache_path: Path,
        fim: FillInMiddle | None = None,
    ):
        self._request = request
        key: dict[str, str | int | None] = {
            "version": f"{_BLEND_CODE_VERSION}.{INDEX_CODE_VERSION}",
            **{f"data {i}": member.identity for i, member in enumerate(members)},
            "weights": None if request.weights is None else " ".join(map(repr, request.weights)),
            "num_samples": request.num_samples,
            "sequence_length": request.sequence_length,
            "seed": request.seed,
            "documents": request.documents_key,
            "vocab_size": request.vocab_size,
            "max_epochs": None if request.max_epochs is None else repr(request.max_epochs),
        }
        arrays = cached_entry(cache_path, "blend", key, lambda writer: _build(members, request, writer))
        self.dataset_index, self.position_index = arrays["dataset_index"], arrays["position_index"]
        self._tokens, self._shares = arrays["tokens"], arrays["shares"]
        self.contents = tuple(row.tobytes().hex() for row in arrays["contents"])
        """The fingerprint of each dataset's tokens, known without opening it."""
        self.datasets = tuple(
            GPTSamples(member.open, indices, request.sequence_length, bounds, fim and fim.of_dataset(number))
            for number, (member, indices) in enumerate(zip(members, _taken_apart(arrays), strict=True))
        )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a blend of {len(self)}")
        return self.datasets[self.dataset_index[index]][int(self.position_index[index])]

    def pieces(self, index: int) -> list[Piece]:
        number = int(self.dataset_index[index])
        pieces = self.datasets[number].pieces(int(self.position_index[index]))
        return [replace(piece, dataset=number) for piece in pieces]

    def has_same_order_for(self, num_samples: int | None) -> bool:
        """The blend of fewer samples is the beginning of that of more; what may change is the epochs of a dataset.

        Nor is it known where ``max_epochs`` leaves no room for so many: that run had another limit.
        """
        if num_samples is None or _room(_limits(self._tokens, self._request), num_samples) < num_samples:
            return False
        counts = [
            np.bincount(_serve(self._tokens, self._shares, self._request, wanted)[0], minlength=len(self._tokens))
            for wanted in (num_samples, len(self))
        ]
        return all(
            before == now or _plan(before, tokens, self._request) == _plan(now, tokens, self._request)
            for before, now, tokens in zip(*(c.tolist() for c in counts), self._tokens.tolist(), strict=True)
        )


def _plan(num_samples: int, num_tokens: int, request: Request) -> object:
    return plan_epochs(num_tokens, request.sequence_length, num_samples) if num_samples else None


def _build(members: Sequence[Member], request: Request, writer: EntryWriter) -> None:
    opened = [member.open() for member in members]
    for indexed in opened:
        check_vocabulary(indexed, request.vocab_size)
    documents = [request.documents(len(indexed)) for indexed in opened]
    tokens = np.array([count_tokens(*pair) for pair in zip(opened, documents, strict=True)], dtype=np.int64)
    shares = tokens.astype(np.float64) if request.weights is None else np.array(request.weights)
    dataset_index, position_index = _serve(tokens, shares, request, request.num_samples)
    counts = np.bincount(dataset_index, minlength=len(members)).tolist()
    own = [
        IndexRequest(indexed, chosen, count, request.sequence_length, request.seed) if count else None
        for indexed, chosen, count in zip(opened, documents, counts, strict=True)
    ]
    contents = np.array([list(bytes.fromhex(indexed.fingerprint)) for indexed in opened], dtype=np.uint8)
    small = {
        "dataset_index": dataset_index,
        "position_index": position_index,
        "tokens": tokens,
        "shares": shares,
        "contents": contents,
    }
    for name, array in small.items():
        writer.save(name, array)
    del small, dataset_index, position_index  # what follows is as large
    _write_joined(own, writer)


def _serve(tokens: np.ndarray, shares: np.ndarray, request: Request, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens: int64 [d] of one epoch, shares: float64 [d] -> uint16 [n], int64 [n]; without tokens no samples."""
    if not tokens.any():
        raise DataError(
            f"the {len(tokens)} datasets of the blend hold 0 tokens for this split; choose other data or another "
            "--split."
        )
    limits = _limits(tokens, request)
    room = _room(limits, num_samples)
    if room < num_samples:
        raise DataError(
            f"--max_epochs_per_dataset {request.max_epochs:g} leaves {room} samples of {request.sequence_length} "
            f"tokens, and {num_samples} are wanted; train fewer iterations, allow more epochs, or add data."
        )
    return helpers.build_blend_index(shares.tolist(), limits.tolist(), num_samples)


def _limits(tokens: np.ndarray, request: Request) -> np.ndarray:
    """tokens: int64 [d] of one epoch -> int64 [d], how many samples each dataset may serve."""
    limits = np.full(len(tokens), _UNLIMITED)
    if request.max_epochs is not None:
        limits = (np.floor(tokens * request.max_epochs).astype(np.int64) - 1) // request.sequence_length
    limits[tokens == 0] = 0
    return limits


def _room(limits: np.ndarray, num_samples: int) -> int:
    """How many of `num_samples` there are within the limits."""
    return int(limits.clip(0, num_samples).sum())


def _write_joined(requests: Sequence[IndexRequest | None], writer: EntryWriter) -> None:
    """The indices of all datasets end to end, and where each one's part ends: "..._end", int64 [d]."""
    forms = [None if request is None else request.sizes.arrays for request in requests]
    with ExitStack() as files:
        appends = {}
        for name in _PARTS:
            own = [None if form is None else form[name] for form in forms]
            present = [form for form in own if form is not None]
            ends = np.cumsum([0 if form is None else form[0][0] for form in own])
            writer.save(f"{name}_end", ends)
            shape = (int(ends[-1]), *present[0][0][1:])
            dtype = np.result_type(*(dtype for _, dtype in present))
            appends[name] = files.enter_context(writer.array(name, shape, dtype))
        for request in requests:
            if request is not None:
                request.build(lambda name, array: appends[name](array))


def _taken_apart(arrays: Arrays) -> Iterator[Arrays]:
    ends = {name: arrays[f"{name}_end"].tolist() for name in _PARTS}
    for i in range(len(ends[_PARTS[0]])):
        yield {name: arrays[name][ends[name][i - 1] if i else 0 : ends[name][i]] for name in _PARTS}
