"""Writing files of tensors with a checksum for every block; `verified_file` reads them.

The layout is known from shapes alone and rows are taken one group after another, so that the memory of a file being
written is one group; the space is reserved before the first byte.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron.checkpoint.container import StoredTensor, build_header, bytes_of, data_end
from megatron.checkpoint.manifest import FileRecord, Piece
from megatron.checkpoint.plan import Rectangle

# Small enough that a slice drags little along and a block stays in the processor's cache between read and checksum.
BLOCK_BYTES = 4 * 2**20

_NO_RESERVATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True)
class PlannedPiece:
    """A rectangle of an entry that a file will hold."""

    entry: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rectangle: Rectangle

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


def write_file(path: Path, pieces: Sequence[OutgoingPiece], *, block_bytes: int = BLOCK_BYTES) -> WrittenFile:
    """Writes a new file durably. Raises OSError, for lack of space before anything is written."""
    with FileWriter(path, pieces, block_bytes=block_bytes) as writer:
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

    def __init__(self, path: Path, pieces: Sequence[PlannedPiece], *, block_bytes: int = BLOCK_BYTES):
        self._path = path
        self._pieces = sorted(pieces, key=lambda p: p.order)
        self._block_bytes = block_bytes
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
        self._blocks = _BlockWriter(self._file, block_bytes)

    def append(self, rows: Tensor) -> None:
        """Writes the next rows of the next piece; `rows` may be strided, on a device, and need not be a whole piece."""
        for group in _row_groups(rows, self._block_bytes):
            self._blocks.write(bytes_of(group))

    def finish(self) -> WrittenFile:
        assert self._blocks.num_bytes == self._data_bytes, "the rows are not those of the pieces that were announced"
        self._file.flush()
        os.fsync(self._file.fileno())
        record = FileRecord(
            self._header_bytes + self._data_bytes,
            self._header_bytes,
            self._header_crc32,
            self._block_bytes,
            tuple(self._blocks.checksums),
        )
        name = self._path.name
        written = (WrittenPiece(p.entry, p.shape, p.dtype, Piece(name, p.key, p.rectangle)) for p in self._pieces)
        return WrittenFile(name, record, tuple(written))

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


class _BlockWriter:
    """Writes bytes and keeps the CRC-32 of each block of the data section."""

    def __init__(self, file: BinaryIO, block_bytes: int):
        self._file = file
        self._block_bytes = block_bytes
        self._room = 0
        self.num_bytes = 0
        self.checksums: list[int] = []

    def write(self, content: memoryview) -> None:
        while content:
            if self._room == 0:
                self.checksums.append(0)
                self._room = self._block_bytes
            part, content = content[: self._room], content[self._room :]
            self._file.write(part)
            self.checksums[-1] = zlib.crc32(part, self.checksums[-1])
            self._room -= len(part)
            self.num_bytes += len(part)


def _layout(ordered: Sequence[PlannedPiece]) -> tuple[bytes, dict[str, StoredTensor]]:
    header, tensors = build_header({piece.key: (piece.dtype, piece.rectangle.size) for piece in ordered})
    assert len(tensors) == len(ordered), "a rectangle was handed in twice"
    return header, tensors


def _row_groups(tensor: Tensor, limit_bytes: int) -> Iterator[Tensor]:
    """The tensor as contiguous CPU tensors of some rows each: a strided or device tensor is never copied whole."""
    if tensor.numel() == 0:
        return
    rows = tensor if tensor.dim() else tensor.reshape(1)
    row_bytes = rows[0].numel() * rows.element_size()
    for group in rows.split(max(1, limit_bytes // row_bytes)):
        yield group.detach().cpu().contiguous()


def _reserve(file: BinaryIO, num_bytes: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in _NO_RESERVATION:  # some network file systems cannot reserve; they fail while writing
            raise OSError(error.errno, f"{error.strerror} ({num_bytes / 2**30:.3f} GiB needed)", file.name) from error
