"""Resharding is arithmetic on rectangles: which stored pieces a wanted rectangle is made of, and a proof that
pieces cover a tensor exactly once. No files, no tensors, no ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rectangle:
    """The elements ``start[d] <= index[d] < start[d] + size[d]`` of a tensor. A scalar: no dimension, one element."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Rectangle:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        return math.prod(self.size)

    def intersection(self, other: Rectangle) -> Rectangle | None:
        """The common rectangle; None if it has no elements."""
        start = tuple(map(max, self.start, other.start))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True))
        size = tuple(end - first for first, end in zip(start, ends, strict=True))
        return Rectangle(start, size) if all(n > 0 for n in size) else None

    def contains(self, other: Rectangle) -> bool:
        return all(
            a <= b and b + m <= a + n for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)
        )

    def slices_in(self, outer: Rectangle) -> tuple[slice, ...]:
        """Where this rectangle lies in a tensor that holds `outer`."""
        offsets = (mine - theirs for mine, theirs in zip(self.start, outer.start, strict=True))
        return tuple(slice(offset, offset + n) for offset, n in zip(offsets, self.size, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(self.start, self.size, strict=True)) + "]"


@dataclass(frozen=True)
class Part:
    """The part of a wanted rectangle that stored piece number `piece` holds."""

    piece: int
    rectangle: Rectangle


def parts_of(wanted: Rectangle, pieces: Sequence[Rectangle]) -> list[Part]:
    """The non-empty intersections of `wanted` with each piece; they tile `wanted` if the pieces tile the tensor."""
    common = ((number, wanted.intersection(piece)) for number, piece in enumerate(pieces))
    return [Part(number, rectangle) for number, rectangle in common if rectangle is not None]


def bounding_rectangle(rectangles: Sequence[Rectangle]) -> Rectangle:
    """The smallest rectangle that contains all of these."""
    start = tuple(map(min, zip(*(r.start for r in rectangles), strict=True)))
    ends = map(max, zip(*(map(sum, zip(r.start, r.size, strict=True)) for r in rectangles), strict=True))
    return Rectangle(start, tuple(end - first for first, end in zip(start, ends, strict=True)))


def tiling_defect(shape: Sequence[int], pieces: Sequence[Rectangle]) -> str | None:
    """None if `pieces` cover every element of a tensor of `shape` exactly once, else what is wrong.

    Pieces inside the tensor that are pairwise disjoint and have as many elements as the tensor tile it.
    """
    whole = Rectangle.whole(shape)
    for piece in pieces:
        if len(piece.start) != len(shape) or not whole.contains(piece):
            return f"the piece {piece} does not lie in the shape {list(shape)}"
    for one, other in _overlapping_pairs(pieces):
        return f"the pieces {one} and {other} overlap"
    missing = whole.num_elements - sum(piece.num_elements for piece in pieces)
    return f"{missing} of its {whole.num_elements} elements are in no piece" if missing else None


def _overlapping_pairs(pieces: Sequence[Rectangle]) -> Iterator[tuple[Rectangle, Rectangle]]:
    """Sweeps along dimension 0, so that only pieces which share rows are compared: rows dealt out over hundreds of
    data-parallel ranks cost no more than a sort."""
    open_pieces: list[Rectangle] = []
    for piece in sorted((p for p in pieces if p.num_elements), key=lambda p: p.start):
        if piece.start:
            open_pieces = [other for other in open_pieces if other.start[0] + other.size[0] > piece.start[0]]
        yield from ((other, piece) for other in open_pieces if other.intersection(piece) is not None)
        open_pieces.append(piece)
