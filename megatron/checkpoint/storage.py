"""Writing files of tensors with a checksum for every tile of each (`tiles`); `verified_file` reads them.

The layout is known from shapes alone and rows are taken one group after another, so that the memory of a file being
written is one group; the space is reserved before the first byte.
"""

from __future__ import annotations

import errno
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.checkpoint.container import StoredTensor, build_header, data_end
from megatron.checkpoint.manifest import FileRecord, Piece
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.tiles import TILE_BYTES, TileGrid, Tiles, checksum, matrix_of, pack_checksums, tile_shape
from megatron.core.sharding import Cut

_NO_RESERVATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True)
class PlannedPiece:
    """A rectangle of an entry that a file will hold. Its tiles are laid for slices that follow the entry's `cut`."""

    entry: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rectangle: Rectangle
    cut: Cut | None

    @property
    def key(self) -> str:
        """Its name in the file: a whole entry keeps its own, so that a file of whole entries reads as plain weights."""
        return self.entry if self.rectangle.size == self.shape else f"{self.entry}{self.rectangle}"

    @property
    def num_bytes(self) -> int:
        return self.rectangle.num_elements * self.dtype.itemsize

    @property
    def order(self) -> tuple[int, str, tuple[int, ...]]:
        """Its place in a file: wide elements first, so that every tensor is aligned; then by name, which is the order
        loading asks for."""
        return -self.dtype.itemsize, self.entry, self.rectangle.start


@dataclass(frozen=True)
class OutgoingPiece(PlannedPiece):
    """A piece with its content. `read` is called once, when its turn has come: it gives the rectangle, or an iterator
    over consecutive rows of it.
    """

    read: Callable[[], Tensor | Iterator[Tensor]]


@dataclass(frozen=True)
class WrittenPiece:
    entry: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    piece: Piece


@dataclass(frozen=True)
class WrittenFile:
    name: str
    record: FileRecord
    pieces: tuple[WrittenPiece, ...]


def write_file(path: Path, pieces: Sequence[OutgoingPiece], *, tile_bytes: int = TILE_BYTES) -> WrittenFile:
    """Writes a new file durably. Raises OSError, for lack of space before anything is written."""
    with FileWriter(path, pieces, tile_bytes=tile_bytes) as writer:
        for piece in sorted(pieces, key=lambda p: p.order):
            content = piece.read()
            for rows in [content] if isinstance(content, Tensor) else content:
                assert rows.dtype == piece.dtype, piece
                writer.append(rows)
        return writer.finish()


def planned_file_bytes(pieces: Sequence[PlannedPiece]) -> int:
    """The exact size of a file of these pieces."""
    header, tensors = _layout(sorted(pieces, key=lambda p: p.order))
    return len(header) + data_end(tensors)


class FileWriter(AbstractContextManager["FileWriter"]):
    """A new file that takes its pieces row after row, in their `order`, and is durable once `finish` returns.

    Opening it writes the header and reserves the space of everything; raises OSError if there is not enough.
    """

    def __init__(self, path: Path, pieces: Sequence[PlannedPiece], *, tile_bytes: int = TILE_BYTES):
        self._path = path
        self._pieces = sorted(pieces, key=lambda p: p.order)
        self._tile_bytes = tile_bytes
        header, tensors = _layout(self._pieces)
        self._header_bytes, self._header_crc32 = len(header), zlib.crc32(header)
        self._data_bytes = data_end(tensors)
        self._file = open(path, "xb")  # noqa: SIM115 - closed by __exit__
        try:
            _reserve(self._file, len(header) + self._data_bytes)
            self._file.write(header)
        except BaseException:
            self._file.close()
            raise
        self._summed = {p.key: _SummedTensor(p, tile_bytes) for p in self._pieces if p.num_bytes}
        self._unfinished = deque(self._summed.values())

    def append(self, rows: Tensor) -> None:
        """Writes the next rows of the next piece; `rows` may be strided, on a device, and need not be a whole piece."""
        for group in _row_groups(rows, self._tile_bytes):
            content = matrix_of(group)
            self._file.write(content.data)
            self._unfinished[0].add(content)
            if self._unfinished[0].is_finished:
                self._unfinished.popleft()

    def finish(self) -> WrittenFile:
        assert not self._unfinished, "the rows are not those of the pieces that were announced"
        self._file.flush()
        os.fsync(self._file.fileno())
        record = FileRecord(
            self._header_bytes + self._data_bytes,
            self._header_bytes,
            self._header_crc32,
            {key: tensor.tiles() for key, tensor in self._summed.items()},
        )
        name = self._path.name
        written = (WrittenPiece(p.entry, p.shape, p.dtype, Piece(name, p.key, p.rectangle)) for p in self._pieces)
        return WrittenFile(name, record, tuple(written))

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


class _SummedTensor:
    """The checksums of a tensor that comes some rows at a time: one runs for each strip of the group under way."""

    def __init__(self, piece: PlannedPiece, tile_bytes: int):
        shape = piece.rectangle.size
        self._grid = TileGrid.over(shape, piece.dtype, *tile_shape(shape, piece.dtype, piece.cut, tile_bytes))
        self._num_rows = 0
        self._checksums: list[int] = []

    @property
    def is_finished(self) -> bool:
        return self._num_rows == self._grid.num_rows

    def add(self, content: NDArray[np.uint8]) -> None:
        """content: [rows, bytes of a row], the next ones."""
        grid, first = self._grid, self._num_rows
        self._num_rows += len(content)
        assert self._num_rows <= grid.num_rows and content.shape[1] == grid.row_bytes, "rows of another piece"
        for group, rows in grid.groups_with(range(first, self._num_rows)):
            if rows.start == grid.rows_of(group).start:
                self._checksums += [0] * len(grid.strips)
            part = content[rows.start - first : rows.stop - first]
            for strip in grid.strips:
                columns = grid.bytes_of(range(strip, strip + 1))
                number = grid.number(group, strip)
                self._checksums[number] = checksum(part[:, columns.start : columns.stop], self._checksums[number])

    def tiles(self) -> Tiles:
        return Tiles(self._grid.rows, self._grid.columns, pack_checksums(self._checksums))


def _layout(ordered: Sequence[PlannedPiece]) -> tuple[bytes, dict[str, StoredTensor]]:
    header, tensors = build_header({piece.key: (piece.dtype, piece.rectangle.size) for piece in ordered})
    assert len(tensors) == len(ordered), "a rectangle was handed in twice"
    return header, tensors


def _row_groups(tensor: Tensor, limit_bytes: int) -> Iterator[Tensor]:
    """The tensor as contiguous CPU tensors of some rows each: a strided or device tensor is never copied whole."""
    if tensor.numel() == 0:
        return
    rows = tensor if tensor.dim() else tensor.reshape(1)
    row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
    for group in rows.split(max(1, limit_bytes // row_bytes)):
        yield group.detach().cpu().contiguous()


def _reserve(file: BinaryIO, num_bytes: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in _NO_RESERVATION:  # some network file systems cannot reserve; they fail while writing
            raise OSError(error.errno, f"{error.strerror} ({num_bytes / 2**30:.3f} GiB needed)", file.name) from error
