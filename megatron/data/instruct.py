"""Conversations as samples: each alone, or several packed into one, with a weight for every token's loss.

Legend: s the run's sequence length, t tokens of a sample.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from megatron.data import helpers
from megatron.data.conversation import Role
from megatron.data.index_cache import cached_arrays
from megatron.data.indexed import IndexedDataset, default_cache_path, name_of
from megatron.data.object_store import ObjectStore
from megatron.data.permutation import permuted
from megatron.data.pieces import Piece
from megatron.data.sample import Sample
from megatron.errors import DataError

TEXT_SUFFIX, ROLE_SUFFIX = "-text", "-role"
_PLAN_CODE_VERSION = 1

LossRole = Literal["assistant", "user", "all"]


@dataclass(frozen=True)
class LossWeights:
    """1 for labels that `role` says, `others` for the rest of a conversation."""

    role: LossRole = "assistant"
    others: float = 0.0

    def of(self, roles: np.ndarray) -> np.ndarray:
        """roles: [t], of the labels -> float32 [t]."""
        if self.role == "all":
            return np.ones(len(roles), dtype=np.float32)
        counted = Role.ASSISTANT if self.role == "assistant" else Role.PROMPTER
        return np.where(roles == counted, np.float32(1.0), np.float32(self.others))


class Conversations:
    """The two files of one instruction dataset, opened when they are needed first."""

    def __init__(self, prefix: str | os.PathLike[str], store: ObjectStore | None = None):
        self.prefix = instruction_prefix(prefix)
        self._store = store

    @cached_property
    def text(self) -> IndexedDataset:
        text = self._opened(TEXT_SUFFIX)
        if not np.array_equal(text.sequence_lengths, self._roles.sequence_lengths):
            raise DataError(
                f"{self.prefix}: {TEXT_SUFFIX} and {ROLE_SUFFIX} hold conversations of different lengths; they are not "
                "of one run: repeat the preprocessing."
            )
        return text

    @cached_property
    def _roles(self) -> IndexedDataset:
        return self._opened(ROLE_SUFFIX)

    def _opened(self, suffix: str) -> IndexedDataset:
        try:
            return IndexedDataset(f"{self.prefix}{suffix}", self._store)
        except DataError as error:
            raise DataError(
                f"--data_type instruction reads {self.prefix}{TEXT_SUFFIX} and {ROLE_SUFFIX}, as "
                f"tools/preprocess_instruct_data.py writes them: {error}"
            ) from error

    def read(self, number: int, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first tokens [t] of one conversation, and their roles [t]."""
        length = min(max_tokens, int(self.text.sequence_lengths[number]))
        return self.text.get(number, 0, length), self._roles.get(number, 0, length)


def instruction_prefix(path: str | os.PathLike[str]) -> str:
    """``x``, ``x-text`` and ``x-role``, with .bin or .idx or without, all name the dataset ``x``."""
    text = name_of(path)
    return text[: -len(TEXT_SUFFIX)] if text.endswith((TEXT_SUFFIX, ROLE_SUFFIX)) else text


@dataclass(frozen=True)
class Truncation:
    """What does not fit into a sample: how many conversations are cut, of how many, and the tokens that are lost."""

    num_cut: int
    num_conversations: int
    lost_tokens: int

    def __add__(self, other: Truncation) -> Truncation:
        return Truncation(
            self.num_cut + other.num_cut,
            self.num_conversations + other.num_conversations,
            self.lost_tokens + other.lost_tokens,
        )


@dataclass(frozen=True)
class Packs:
    """Which conversations share a sample: pack k is items[starts[k] : starts[k + 1]]; `filled` is the share of slots
    that hold a token."""

    items: np.ndarray
    starts: np.ndarray
    filled: float

    def __len__(self) -> int:
        return len(self.starts) - 1


def plan_packs(conversations: Conversations, documents: range, sequence_length: int, cache_path: Path | None) -> Packs:
    """The plan for the conversations of one range, from the cache if it is there."""
    text, capacity = conversations.text, sequence_length + 1
    key: dict[str, str | int | bool | None] = {
        "version": _PLAN_CODE_VERSION,
        "data": text.fingerprint,
        "documents": f"{documents.start}:{documents.stop}",
        "sequence_length": sequence_length,
    }
    lengths = np.minimum(text.sequence_lengths[documents.start : documents.stop], capacity)

    def build() -> dict[str, np.ndarray]:
        # An empty conversation takes a place too; it is never seen.
        items, starts = helpers.build_packing_plan(np.maximum(lengths, 1), capacity)
        return {"items": items, "starts": starts}

    folder = cache_path if cache_path is not None else default_cache_path(conversations.prefix)
    arrays = cached_arrays(folder, "packs", key, build)
    num_packs = len(arrays["starts"]) - 1
    return Packs(arrays["items"], arrays["starts"], int(lengths.sum(dtype=np.int64)) / (num_packs * capacity))


class InstructionDataset:
    """Each epoch serves every conversation, or every pack, of one range once, in an order of its own.

    Samples are as long as they are: whoever puts them side by side pads them. `num_samples` may be any number, and the
    order does not depend on it. At most `sequence_length` + 1 tokens of a conversation are used.
    """

    def __init__(
        self,
        conversations: Conversations,
        documents: range,
        num_samples: int,
        sequence_length: int,
        seed: int,
        *,
        weights: LossWeights = LossWeights(),
        packs: Packs | None = None,
    ):
        if len(documents) == 0:
            raise DataError(f"{conversations.prefix}: no conversations; choose other data or another --split.")
        self.conversations, self.documents, self.packs = conversations, documents, packs
        self.samples_per_epoch = len(documents) if packs is None else len(packs)
        self._num_samples, self._sequence_length, self._seed = num_samples, sequence_length, seed
        self._weights = weights

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)}")
        numbers = self._numbers(index)
        return self._alone(numbers[0]) if self.packs is None else self._packed(numbers)

    def pieces(self, index: int) -> list[Piece]:
        """Where the tokens of sample `index` come from, in their order."""
        numbers = self._numbers(index)
        lengths = [len(self.conversations.read(number, self._sequence_length + 1)[0]) for number in numbers]
        starts = [0, *accumulate(lengths)][:-1]
        placed = zip(starts, numbers, lengths, strict=True)
        return [Piece(start, number, 0) for start, number, length in placed if length]

    def roles(self, index: int) -> np.ndarray:
        """[t], who says the tokens of sample `index`."""
        parts = [self.conversations.read(number, self._sequence_length + 1)[1] for number in self._numbers(index)]
        return np.concatenate(parts)

    def _numbers(self, index: int) -> list[int]:
        """The conversations of a sample."""
        epoch, place = divmod(index, self.samples_per_epoch)
        chosen = permuted(place, self.samples_per_epoch, self._seed, epoch)
        if self.packs is None:
            return [self.documents.start + chosen]
        items = self.packs.items[self.packs.starts[chosen] : self.packs.starts[chosen + 1]]
        return [self.documents.start + item for item in items.tolist()]

    def has_same_order_for(self, num_samples: int | None) -> bool:
        """Every sample's place is a function of the seed alone."""
        return num_samples is not None

    def truncation(self) -> Truncation:
        lengths = self.conversations.text.sequence_lengths[self.documents.start : self.documents.stop]
        lost = lengths[lengths > self._sequence_length + 1].astype(np.int64) - (self._sequence_length + 1)
        return Truncation(len(lost), len(lengths), int(lost.sum()))

    def _alone(self, number: int) -> Sample:
        tokens, roles = self.conversations.read(number, self._sequence_length + 1)
        if len(tokens) < 2:  # without a label there is nothing to learn, and yet it is one sample
            return Sample(np.zeros(2, np.int64), np.zeros(1, np.float32))
        return Sample(tokens.astype(np.int64), self._weights.of(roles[1:]))

    def _packed(self, numbers: list[int]) -> Sample:
        """The conversations end to end. What follows the last token of one is no label of its."""
        parts = [self.conversations.read(number, self._sequence_length + 1) for number in numbers]
        parts = [part for part in parts if len(part[0])]
        tokens = np.concatenate([np.empty(0, np.int64), *(tokens for tokens, _ in parts)])
        if len(tokens) < 2:
            return Sample(np.zeros(2, np.int64), np.zeros(1, np.float32), np.zeros(1, np.int64), np.zeros(1, np.int32))
        starts = np.cumsum([0, *(len(tokens) for tokens, _ in parts[:-1])], dtype=np.int32)
        weights = self._weights.of(np.concatenate([roles for _, roles in parts])[1:])
        weights[starts[1:] - 1] = 0.0
        positions, segments = helpers.number_documents(starts, len(tokens) - 1)
        return Sample(tokens, weights, positions, segments)
