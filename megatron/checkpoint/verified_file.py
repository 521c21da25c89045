"""Reading files of tensors with checksums, tile by tile (`tiles`): only a whole tile can be verified."""

from __future__ import annotations

import math
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.checkpoint.container import StoredTensor, parse_header
from megatron.checkpoint.manifest import FileRecord
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.tiles import CHECKSUM_BYTES, TileGrid, Tiles, checksum, matrix_of
from megatron.errors import DamagedCheckpointError, listed

_REMEDY = "Restore the file or load another iteration with --load_iters."


class VerifiedFile:
    """Reads a written file. Where bytes are wrong, each method raises DamagedCheckpointError: file, tensor, tile."""

    def __init__(self, folder: Path, name: str, record: FileRecord):
        self._path = folder / name
        self._record = record
        self._buffer = np.empty(0, np.uint8)
        self._held: tuple[str, int, range, NDArray[np.uint8]] | None = None
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise DamagedCheckpointError(
                f"{self._path} cannot be opened ({error.strerror}), but the manifest lists it as part of the "
                f"checkpoint. {_REMEDY}"
            ) from error
        weakref.finalize(self, os.close, self._descriptor)
        self._tensors = self._read_header()
        self._grids = self._fitting_grids(record.tiles)

    def read(self, key: str, rectangle: Rectangle, out: Tensor) -> None:
        """Fills `out`, of the rectangle's size, with that part of the tensor `key`. `out` may be a rectangle of a
        contiguous tensor. Reads the tiles in which the part lies, and nothing else.
        """
        stored = self._tensors[key]
        if out.numel() == 0:
            return
        if rectangle.size[2:] != stored.shape[2:]:  # these bytes of a row lie apart: those between come along
            whole = Rectangle.whole(stored.shape)
            wide = Rectangle(rectangle.start[:2] + whole.start[2:], rectangle.size[:2] + whole.size[2:])
            content = torch.empty(wide.size, dtype=stored.dtype)
            self.read(key, wide, content)
            out.copy_(content[rectangle.slices_in(wide)])
            return
        element_bytes = math.prod(stored.shape[2:]) * stored.dtype.itemsize
        start, size = (*rectangle.start, 0, 0), (*rectangle.size, 1, 1)
        rows = range(start[0], start[0] + size[0])
        columns = range(start[1] * element_bytes, (start[1] + size[1]) * element_bytes)
        self._read_part(key, rows, columns, matrix_of(out))

    def damage(self, *, on_bytes: Callable[[int], object]) -> list[str]:
        """Reads everything; one message for each tile that is not what was written. `on_bytes` hears of bytes read."""
        found = []
        for key, grid in self._grids.items():
            for group in range(grid.num_groups):
                content = self._in_buffer(len(grid.rows_of(group)), grid.row_bytes)
                try:
                    self._read_strips(key, group, grid.strips, content)
                    wrong = self._wrong_strips(key, group, grid.strips, content)
                    found += [f"{self._describe(key, group, strip)}." for strip in wrong]
                except DamagedCheckpointError as error:
                    found.append(str(error))
                on_bytes(content.nbytes)
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

    def _fitting_grids(self, tiles: Mapping[str, Tiles]) -> dict[str, TileGrid]:
        """The grid of each tensor that has elements. The manifest and the file must speak of the same tensors."""
        grids = {}
        for key, stored in self._tensors.items():
            if stored.num_bytes == 0:
                continue
            if key in tiles and min(tiles[key].rows, tiles[key].columns) > 0:
                grids[key] = TileGrid.over(stored.shape, stored.dtype, tiles[key].rows, tiles[key].columns)
            if key not in grids or grids[key].num_tiles * CHECKSUM_BYTES != len(tiles[key].crc32):
                raise DamagedCheckpointError(
                    f"{self._path}: the manifest does not have a checksum for every tile of {key}: "
                    f"it is damaged or belongs to another checkpoint. {_REMEDY}"
                )
        if foreign := sorted(tiles.keys() - grids.keys()):
            raise DamagedCheckpointError(
                f"{self._path} does not hold {listed(foreign, ', ', most=4)}, of which the manifest has checksums: "
                f"it is damaged or belongs to another checkpoint. {_REMEDY}"
            )
        return grids

    def _read_part(self, key: str, rows: range, columns: range, out: NDArray[np.uint8]) -> None:
        """Fills `out` with these bytes of these rows. Whole tiles go straight into place."""
        grid = self._grids[key]
        strips = grid.strips_with(columns)
        held = grid.bytes_of(strips)
        is_in_place = columns == held and (out.flags.c_contiguous or strips != grid.strips)
        for group, part in grid.groups_with(rows):
            target = out[part.start - rows.start : part.stop - rows.start]
            group_rows = grid.rows_of(group)
            if is_in_place and part == group_rows:
                self._read_verified(key, group, strips, target)
            else:
                tiles, first = self._tiles(key, group, strips)
                target[:] = tiles[
                    part.start - group_rows.start : part.stop - group_rows.start,
                    columns.start - first : columns.stop - first,
                ]

    def _tiles(self, key: str, group: int, strips: range) -> tuple[NDArray[np.uint8], int]:
        """Verified strips of a group, and the first byte of a row that they hold. The last ones are kept: what is read
        next often begins in them.
        """
        grid, held = self._grids[key], self._held
        if held is None or held[:2] != (key, group) or not held[2].start <= strips.start < strips.stop <= held[2].stop:
            content = self._in_buffer(len(grid.rows_of(group)), len(grid.bytes_of(strips)))
            self._read_verified(key, group, strips, content)
            self._held = held = key, group, strips, content
        return held[3], grid.bytes_of(held[2]).start

    def _in_buffer(self, num_rows: int, row_bytes: int) -> NDArray[np.uint8]:
        self._held = None  # until what comes here is verified
        if len(self._buffer) < num_rows * row_bytes:
            self._buffer = np.empty(num_rows * row_bytes, np.uint8)
        return self._buffer[: num_rows * row_bytes].reshape(num_rows, row_bytes)

    def _read_verified(self, key: str, group: int, strips: range, out: NDArray[np.uint8]) -> None:
        self._read_strips(key, group, strips, out)
        for strip in self._wrong_strips(key, group, strips, out):
            raise DamagedCheckpointError(f"{self._describe(key, group, strip)}. {_REMEDY}")

    def _read_strips(self, key: str, group: int, strips: range, out: NDArray[np.uint8]) -> None:
        """out: [rows of the group, bytes of the strips]. All strips of a group are one stretch of the file."""
        grid = self._grids[key]
        first = self._position(key, group, strips.start)
        if strips == grid.strips:
            self._read_fully(first, out.reshape(-1).data)
            return
        for number, row in enumerate(out):
            self._read_fully(first + number * grid.row_bytes, row.data)

    def _wrong_strips(self, key: str, group: int, strips: range, content: NDArray[np.uint8]) -> Iterator[int]:
        grid, tiles = self._grids[key], self._record.tiles[key]
        first = grid.bytes_of(strips).start
        for strip in strips:
            columns = grid.bytes_of(range(strip, strip + 1))
            tile = content[:, columns.start - first : columns.stop - first]
            if checksum(tile) != tiles.checksum(grid.number(group, strip)):
                yield strip

    def _position(self, key: str, group: int, strip: int) -> int:
        """The first byte of a tile in the file."""
        grid = self._grids[key]
        in_tensor = grid.rows_of(group).start * grid.row_bytes + strip * grid.columns
        return self._record.header_bytes + self._tensors[key].offset + in_tensor

    def _describe(self, key: str, group: int, strip: int) -> str:
        grid, stored = self._grids[key], self._tensors[key]
        rows, columns = grid.rows_of(group), grid.bytes_of(range(strip, strip + 1))
        first = self._position(key, group, strip)
        end = first + (len(rows) - 1) * grid.row_bytes + len(columns)
        place = f"rows {rows.start} to {rows.stop}"
        if len(stored.shape) > 1:
            itemsize = stored.dtype.itemsize
            place += f", columns {columns.start // itemsize} to {columns.stop // itemsize}"
        return (
            f"{self._path}: the tile at {place} of {key} (bytes {first} to {end}) does not have the checksum in the "
            "manifest"
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
