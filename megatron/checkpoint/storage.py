"""Files of tensors with a checksum for every block.

Writing knows the layout from shapes alone and takes chunk after chunk, so that its memory is one chunk; the space is
reserved before the first byte. Reading takes whole blocks, because only a whole block can be verified, and never
returns a byte that was not.
"""

from __future__ import annotations

import errno
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron.checkpoint.container import StoredTensor, build_header, bytes_of, data_end, parse_header
from megatron.checkpoint.manifest import FileRecord, Piece
from megatron.checkpoint.plan import Rectangle
from megatron.errors import DamagedCheckpointError

# Small enough that a slice drags little along and a block stays in the processor's cache between read and checksum.
BLOCK_BYTES = 4 * 2**20

_NO_RESERVATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_MAX_LISTED = 4
_REMEDY = "Restore the file or load another iteration with --load_iters."


@dataclass(frozen=True)
class OutgoingPiece:
    """A rectangle of an entry to be written. `read` is called once, when its turn has come: it gives the rectangle,
    or an iterator over consecutive rows of it.
    """

    entry: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rectangle: Rectangle
    read: Callable[[], Tensor | Iterator[Tensor]]

    @property
    def key(self) -> str:
        """Its name in the file: a whole entry keeps its own, so that a file of whole entries reads as plain weights."""
        return self.entry if self.rectangle.size == self.shape else f"{self.entry}{self.rectangle}"

    @property
    def num_bytes(self) -> int:
        return self.rectangle.num_elements * self.dtype.itemsize


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
    # Wide elements first, so that every tensor is aligned; then by name, which is the order loading asks for.
    ordered = sorted(pieces, key=lambda p: (-p.dtype.itemsize, p.entry, p.rectangle.start))
    header, tensors = build_header({piece.key: (piece.dtype, piece.rectangle.size) for piece in ordered})
    assert len(tensors) == len(ordered), "a rectangle was handed in twice"
    num_bytes = len(header) + data_end(tensors)
    with open(path, "xb") as file:
        _reserve(file, num_bytes)
        file.write(header)
        blocks = _BlockWriter(file, block_bytes)
        for piece in ordered:
            content = piece.read()
            for chunk in [content] if isinstance(content, Tensor) else content:
                assert chunk.dtype == piece.dtype, piece
                for rows in _row_groups(chunk, block_bytes):
                    blocks.write(bytes_of(rows))
        assert blocks.num_bytes == data_end(tensors), "the chunks are not the pieces that were announced"
        file.flush()
        os.fsync(file.fileno())
    record = FileRecord(num_bytes, len(header), zlib.crc32(header), block_bytes, tuple(blocks.checksums))
    written = (WrittenPiece(p.entry, p.shape, p.dtype, Piece(path.name, p.key, p.rectangle)) for p in ordered)
    return WrittenFile(path.name, record, tuple(written))


class VerifiedFile:
    """Reads a written file. Where bytes are wrong, each method raises DamagedCheckpointError: file, tensors, block."""

    def __init__(self, folder: Path, name: str, record: FileRecord):
        self._path = folder / name
        self._record = record
        self._cached: tuple[int, bytearray] | None = None
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise DamagedCheckpointError(
                f"{self._path} cannot be opened ({error.strerror}), but the manifest lists it as part of the "
                f"checkpoint. {_REMEDY}"
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        self._tensors = self._read_header()

    def read(self, key: str, rectangle: Rectangle, out: Tensor) -> None:
        """Fills `out`, of the rectangle's size, with that part of the tensor `key`."""
        stored = self._tensors[key]
        row_bytes = stored.row_bytes
        first_row = rectangle.start[0] if rectangle.start else 0
        start = stored.offset + first_row * row_bytes
        if rectangle.size[1:] == stored.shape[1:] and out.is_contiguous():
            self._read_bytes(start, bytes_of(out))
            return
        columns = Rectangle(rectangle.start[1:], rectangle.size[1:]).slices_in(Rectangle.whole(stored.shape[1:]))
        rows_at_once = max(1, self._record.block_bytes // row_bytes)
        for target in out.split(rows_at_once):
            rows = torch.empty((len(target), *stored.shape[1:]), dtype=stored.dtype)
            self._read_bytes(start, bytes_of(rows))
            target.copy_(rows[(slice(None), *columns)])
            start += len(target) * row_bytes

    def _read_header(self) -> dict[str, StoredTensor]:
        num_bytes = os.fstat(self._descriptor).st_size
        if num_bytes != self._record.num_bytes:
            raise DamagedCheckpointError(
                f"{self._path} has {num_bytes} bytes and should have {self._record.num_bytes}: "
                f"it was cut off or belongs to another checkpoint. {_REMEDY}"
            )
        header = bytearray(self._record.header_bytes)
        self._read_fully(0, memoryview(header))
        if zlib.crc32(header) != self._record.header_crc32:
            raise DamagedCheckpointError(
                f"{self._path}: the header (bytes 0 to {len(header)}) does not have the checksum in the manifest: "
                f"it is damaged or belongs to another checkpoint. {_REMEDY}"
            )
        return parse_header(bytes(header))

    def _read_bytes(self, offset: int, out: memoryview) -> None:
        """Fills `out` from byte `offset` of the data section. Whole blocks go straight into place."""
        position = 0
        while position < len(out):
            block, skipped = divmod(offset + position, self._record.block_bytes)
            block_length = self._block_length(block)
            length = min(block_length - skipped, len(out) - position)
            target = out[position : position + length]
            if length == block_length:
                self._read_block(block, target)
            else:
                target[:] = self._block(block)[skipped : skipped + length]
            position += length

    def _block(self, block: int) -> memoryview:
        """A verified block; the last one is kept, because neighbouring tensors and row groups share it."""
        if self._cached is None or self._cached[0] != block:
            content = bytearray(self._block_length(block))
            self._read_block(block, memoryview(content))
            self._cached = block, content
        return memoryview(self._cached[1])

    def _read_block(self, block: int, out: memoryview) -> None:
        first = self._record.header_bytes + block * self._record.block_bytes
        self._read_fully(first, out)
        if zlib.crc32(out) != self._record.block_crc32[block]:
            raise DamagedCheckpointError(
                f"{self._path}: block {block} (bytes {first} to {first + len(out)}) does not have the checksum in the "
                f"manifest; damaged: {self._tensors_in(block)}. {_REMEDY}"
            )

    def _read_fully(self, position: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._descriptor, [out[done:]], position + done)
            except OSError as error:
                raise DamagedCheckpointError(
                    f"{self._path} cannot be read at byte {position + done} ({error.strerror}). {_REMEDY}"
                ) from error
            if count == 0:
                raise DamagedCheckpointError(f"{self._path} ends at byte {position + done}: it was cut off. {_REMEDY}")
            done += count

    def _block_length(self, block: int) -> int:
        data_bytes = self._record.num_bytes - self._record.header_bytes
        return min(self._record.block_bytes, data_bytes - block * self._record.block_bytes)

    def _tensors_in(self, block: int) -> str:
        first = block * self._record.block_bytes
        end = first + self._block_length(block)
        keys = [key for key, t in self._tensors.items() if t.offset < end and t.offset + t.num_bytes > first]
        more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
        return ", ".join(keys[:_MAX_LISTED]) + more


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
