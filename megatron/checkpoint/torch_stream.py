"""A tensor that torch.save wrote into a part of a file, read a slice at a time.

torch.load reads such a stream as a whole. It is a zip archive whose records are not compressed, so that the tensor's
bytes can be found and mapped instead.
"""

from __future__ import annotations

import mmap
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Final, cast

import torch
from torch import Tensor

from megatron.checkpoint.container import bytes_of
from megatron.checkpoint.inert_pickle import read_inert
from megatron.checkpoint.plan import Rectangle
from megatron.errors import CheckpointError, DamagedCheckpointError

_DTYPES: Final = MappingProxyType(
    {
        "torch.BFloat16Storage": torch.bfloat16,
        "torch.HalfStorage": torch.float16,
        "torch.FloatStorage": torch.float32,
        "torch.DoubleStorage": torch.float64,
        "torch.BoolStorage": torch.bool,
        "torch.ByteStorage": torch.uint8,
        "torch.CharStorage": torch.int8,
        "torch.ShortStorage": torch.int16,
        "torch.IntStorage": torch.int32,
        "torch.LongStorage": torch.int64,
    }
)
# Before the name in a record's own header, which ends with the lengths of the name and of what follows it.
_HEADER_BYTES: Final = 30


@dataclass(frozen=True)
class _Layout:
    """How the tensor lies in its record, in elements; and the record, in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first: int
    position: int
    num_bytes: int
    crc32: int

    @property
    def is_row_major_and_alone(self) -> bool:
        whole = torch.empty(self.shape, device="meta")
        return self.stride == whole.stride() and self.num_bytes == whole.numel() * self.dtype.itemsize


class TorchStream:
    """The tensor in `num_bytes` bytes of `path` from `offset` on. Raises CheckpointError where they hold none.

    Reading it from its first row to its last, in order, verifies its checksum as well, which torch.load never does.
    """

    def __init__(self, path: Path, offset: int, num_bytes: int):
        self.path, self._offset = path, offset
        try:
            self._layout = _layout(path, offset, num_bytes)
        except CheckpointError:
            raise
        except Exception as error:  # What damaged bytes lead to has no common base.
            raise self._damaged(f"holds no tensor of torch.save ({error})") from error
        self._in_order = threading.local()  # threads read in different places

    @property
    def shape(self) -> tuple[int, ...]:
        return self._layout.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._layout.dtype

    def read(self, rectangle: Rectangle) -> Tensor:
        """The elements of `rectangle`, as a new contiguous tensor."""
        layout, width = self._layout, self._layout.dtype.itemsize
        mapped, shift = _mapped(self.path, layout.position, layout.num_bytes)
        # Elements as rows of bytes, because in the file they need not be aligned.
        content = torch.frombuffer(mapped, dtype=torch.uint8, count=layout.num_bytes, offset=shift)
        strides = (*(stride * width for stride in layout.stride), 1)
        elements = content.as_strided((*layout.shape, width), strides, layout.first * width)
        slices = tuple(slice(a, a + n) for a, n in zip(rectangle.start, rectangle.size, strict=True))
        part = elements[slices].clone(memory_format=torch.contiguous_format).view(layout.dtype).squeeze(-1)
        self._verify(part, rectangle)
        return part

    def _verify(self, part: Tensor, rectangle: Rectangle) -> None:
        """Keeps the checksum of the rows up to here as long as they are read in order."""
        layout = self._layout
        first, num_rows = (rectangle.start[0], rectangle.size[0]) if layout.shape else (0, 1)
        if layout.crc32 == 0 or not layout.is_row_major_and_alone or rectangle.size[1:] != layout.shape[1:]:
            return  # a checksum of zero: torch.save was told to compute none
        checked_rows, crc32 = (0, 0) if first == 0 else getattr(self._in_order, "so_far", (0, 0))
        if first != checked_rows:
            return
        checked_rows, crc32 = checked_rows + num_rows, zlib.crc32(bytes_of(part), crc32)
        self._in_order.so_far = checked_rows, crc32
        if checked_rows == (layout.shape[0] if layout.shape else 1) and crc32 != layout.crc32:
            raise self._damaged("does not have its checksum")

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{self.path}: what lies at byte {self._offset} {what}; the file is damaged. "
            "Copy the checkpoint again from where it was saved, or use another."
        )


def _mapped(path: Path, position: int, num_bytes: int) -> tuple[mmap.mmap, int]:
    """A part of a file, and where it starts in the mapping, which starts at a page."""
    shift = position % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # Copied on write, since torch warns of memory that cannot be written. It is never written.
        mapped = mmap.mmap(file.fileno(), num_bytes + shift, access=mmap.ACCESS_COPY, offset=position - shift)
    return mapped, shift


def _layout(path: Path, offset: int, num_bytes: int) -> _Layout:
    mapped, shift = _mapped(path, offset, num_bytes)
    with zipfile.ZipFile(cast(IO[bytes], mapped)) as archive:
        records = {record.filename.split("/", 1)[-1]: record for record in archive.infolist()}
    position, length = _data_of(mapped, records["data.pkl"])
    tensor = read_inert(mapped[position : position + length], path)
    (_, storage, key, _, num_elements), first, shape, stride = tensor.args[:4]
    dtype = _DTYPES[storage.qualified_name]
    record = records[f"data/{key}"]
    position, length = _data_of(mapped, record)
    reach = first + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
    if length != num_elements * dtype.itemsize or min(first, *shape, *stride, 0) < 0 or reach > num_elements:
        raise ValueError(f"{num_elements} elements in {length} bytes for the shape {list(shape)}")
    if "byteorder" in records:
        start, end = _data_of(mapped, records["byteorder"])
        if mapped[start : start + end] != b"little":
            raise ValueError("numbers with the most significant byte first")
    return _Layout(dtype, shape, stride, first, offset - shift + position, length, record.CRC)


def _data_of(mapped: mmap.mmap, record: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a record lie, and how many they are."""
    header = mapped[record.header_offset : record.header_offset + _HEADER_BYTES]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = record.header_offset + _HEADER_BYTES + lengths
    if record.compress_type != zipfile.ZIP_STORED or start + record.file_size > len(mapped):
        raise ValueError(f"the record {record.filename} is compressed or cut off")
    return start, record.file_size
