"""Where the checksums of a stored tensor lie: a grid of tiles over its rows and bytes of rows.

A tile is what is verified at once, so what a rank reads is made of whole tiles. They are laid so that the slices of
TP2, TP4 and TP8 are, along whichever dimension a tensor is cut. Pure arithmetic, but for `matrix_of` and `checksum`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.core.sharding import Cut

# A group of tiles stays in the processor's cache between read and checksum, and a chunk of a stream
# (`source.row_chunks`) holds a whole one, which then needs no copy.
TILE_BYTES = 2**20

CHECKSUM_BYTES = 4
_NUM_PARTS = (8, 4, 2)
# A padded vocabulary gives every rank a multiple of so many rows (the default of --make_vocab_size_divisible_by).
_PADDED_ROWS = 128


@dataclass(frozen=True)
class Tiles:
    """The checksums of a stored tensor: a CRC-32 (big-endian) for each tile of `rows` rows and `columns` bytes of them,
    group of rows after group; the last of each may be smaller.
    """

    rows: int
    columns: int
    crc32: bytes

    @property
    def num_checksums(self) -> int:
        return len(self.crc32) // CHECKSUM_BYTES

    def checksum(self, number: int) -> int:
        return int.from_bytes(self.crc32[number * CHECKSUM_BYTES : (number + 1) * CHECKSUM_BYTES], "big")


@dataclass(frozen=True)
class TileGrid:
    """`rows` x `columns` tiles over a matrix of `num_rows` x `row_bytes`; a *group* is some whole rows, and consists of
    one tile for each *strip* of bytes of a row.
    """

    num_rows: int
    row_bytes: int
    rows: int
    columns: int

    @classmethod
    def over(cls, shape: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int) -> TileGrid:
        """For a tensor with elements: dimension 0 is its rows, all others are one."""
        return cls(_num_rows(shape), math.prod(shape[1:]) * dtype.itemsize, rows, columns)

    @property
    def num_groups(self) -> int:
        return -(-self.num_rows // self.rows)

    @property
    def strips(self) -> range:
        return range(-(-self.row_bytes // self.columns))

    @property
    def num_tiles(self) -> int:
        return self.num_groups * len(self.strips)

    def rows_of(self, group: int) -> range:
        return range(group * self.rows, min((group + 1) * self.rows, self.num_rows))

    def bytes_of(self, strips: range) -> range:
        """The bytes of a row that consecutive strips hold."""
        return range(strips.start * self.columns, min(strips.stop * self.columns, self.row_bytes))

    def strips_with(self, columns: range) -> range:
        """The strips in which these bytes of a row lie."""
        return range(columns.start // self.columns, -(-columns.stop // self.columns))

    def groups_with(self, rows: range) -> Iterator[tuple[int, range]]:
        """The groups in which these rows lie, each with those of the rows that it holds."""
        for group in range(rows.start // self.rows, -(-rows.stop // self.rows)):
            held = self.rows_of(group)
            yield group, range(max(rows.start, held.start), min(rows.stop, held.stop))

    def number(self, group: int, strip: int) -> int:
        return group * len(self.strips) + strip


def tile_shape(shape: tuple[int, ...], dtype: torch.dtype, cut: Cut | None, limit_bytes: int) -> tuple[int, int]:
    """Rows and bytes of a row for the tiles of a stored tensor with elements. A group of rows has at most
    `limit_bytes`; a row alone that has more is several tiles.
    """
    num_rows, row_bytes = _num_rows(shape), math.prod(shape[1:]) * dtype.itemsize
    room = limit_bytes // row_bytes
    columns = row_bytes
    if cut is not None and cut.dim == 1:
        columns //= next((parts for parts in _NUM_PARTS if shape[1] % parts == 0), 1)
    if not room:
        most = max(1, limit_bytes // dtype.itemsize) * dtype.itemsize
        return 1, min(columns, most)
    rows = _rows_of_slices(num_rows, room, row_bytes, cut, limit_bytes) if cut is not None and cut.dim == 0 else room
    return min(rows, num_rows), columns


def matrix_of(tensor: Tensor) -> NDArray[np.uint8]:
    """The memory of a CPU tensor as [rows, bytes of a row]; writing to it writes to the tensor.

    Its rows may lie apart, but each must be contiguous.
    """
    matrix = tensor.detach().view(_num_rows(tuple(tensor.shape)), -1)
    return matrix.view(torch.uint8).numpy()


def checksum(tile: NDArray[np.uint8], before: int = 0) -> int:
    """The CRC-32 of a tile, row after row; `before` is that of the rows above."""
    return zlib.crc32(np.ascontiguousarray(tile).data, before)


def pack_checksums(checksums: list[int]) -> bytes:
    return b"".join(crc32.to_bytes(CHECKSUM_BYTES, "big") for crc32 in checksums)


def _num_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _rows_of_slices(num_rows: int, room: int, row_bytes: int, cut: Cut, limit_bytes: int) -> int:
    """At most `room` rows, with which slices of the rows begin and end, unless tiles would have to be tiny for it."""
    if not cut.is_even:
        return min(_PADDED_ROWS, 1 << room.bit_length() - 1)
    for parts in _NUM_PARTS:
        if num_rows % parts == 0:
            part = num_rows // parts
            rows = _largest_divisor(part, room)
            if rows == part or 8 * rows * row_bytes >= limit_bytes:
                return rows
    return room


def _largest_divisor(number: int, limit: int) -> int:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return max(divisor for one in small for divisor in (one, number // one) if divisor <= limit)
