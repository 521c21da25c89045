"""Where the tokens of a sample come from: which document, from which token on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megatron.data.sample import Sample


@dataclass(frozen=True)
class Piece:
    """Tokens of a sample from number `start` on are those of `document` from number `offset` on.

    `dataset` is the number of the dataset in a blend, 0 without one; documents are counted from 0 in each.
    """

    start: int
    document: int
    offset: int
    dataset: int = 0


@runtime_checkable
class TraceableSamples(Protocol):
    """Samples that know their origin."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def pieces(self, index: int, /) -> Sequence[Piece]:
        """Where the tokens of a sample come from, in their order; a document that gives it none is left out."""
