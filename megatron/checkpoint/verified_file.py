"""Reading files of tensors with a checksum for every block, block by block: only a whole block can be verified."""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.container import StoredTensor, bytes_of, parse_header
from megatron.checkpoint.manifest import FileRecord
from megatron.checkpoint.plan import Rectangle
from megatron.errors import DamagedCheckpointError, listed

# Whole rows of which only some columns are wanted.
_SCRATCH_BYTES = 2**20
_REMEDY = "Restore the file or load another iteration with --load_iters."


class DamagedBlock(DamagedCheckpointError):
    """A block whose checksum is not the one in the manifest."""


class VerifiedFile:
    """Reads a written file. Where bytes are wrong, each method raises DamagedCheckpointError: file, tensors, block."""

    def __init__(self, folder: Path, name: str, record: FileRecord):
        self._path = folder / name
        self._record = record
        self._buffer = bytearray()
        self._buffered: int | None = None
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
        rows_at_once = max(1, _SCRATCH_BYTES // row_bytes)
        for target in out.split(rows_at_once):
            rows = torch.empty((len(target), *stored.shape[1:]), dtype=stored.dtype)
            self._read_bytes(start, bytes_of(rows))
            target.copy_(rows[(slice(None), *columns)])
            start += len(target) * row_bytes

    def damage(self, *, on_bytes: Callable[[int], object]) -> list[str]:
        """Reads everything; one message for each block that is not what was written, which names all its tensors.

        `on_bytes` hears of each block.
        """
        found = []
        for block in range(len(self._record.block_crc32)):
            try:
                self._block(block)
            except DamagedBlock:
                found.append(f"{self._describe(block)}; damaged: {', '.join(self._tensors_in(block))}.")
            except DamagedCheckpointError as error:
                found.append(str(error))
            on_bytes(self._block_length(block))
        return found

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
        length = self._block_length(block)
        if self._buffered != block:
            if len(self._buffer) < length:
                self._buffer = bytearray(length)
            self._buffered = None  # until its checksum is right
            self._read_block(block, memoryview(self._buffer)[:length])
            self._buffered = block
        return memoryview(self._buffer)[:length]

    def _read_block(self, block: int, out: memoryview) -> None:
        first = self._record.header_bytes + block * self._record.block_bytes
        self._read_fully(first, out)
        if zlib.crc32(out) != self._record.block_crc32[block]:
            keys = self._tensors_in(block)
            raise DamagedBlock(f"{self._describe(block)}; damaged: {listed(keys, ', ', most=4)}. {_REMEDY}")

    def _describe(self, block: int) -> str:
        first = self._record.header_bytes + block * self._record.block_bytes
        end = first + self._block_length(block)
        return f"{self._path}: block {block} (bytes {first} to {end}) does not have the checksum in the manifest"

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

    def _tensors_in(self, block: int) -> list[str]:
        first = block * self._record.block_bytes
        end = first + self._block_length(block)
        return [key for key, t in self._tensors.items() if t.offset < end and t.offset + t.num_bytes > first]
