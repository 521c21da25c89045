"""Tensors in what torch.save wrote, a whole file or a part of one, read a slice at a time.

torch.load reads such a tensor as a whole, or maps the whole file. The format is a zip archive whose records are not
compressed, so that a tensor's bytes can be found and only those of a slice be mapped. Each record has a checksum,
which torch.load ignores.
"""

from __future__ import annotations

import mmap
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final, cast

import torch
from torch import Tensor

from megatron.checkpoint.container import bytes_of
from megatron.checkpoint.inert_pickle import read_inert
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.unpickle import StandIn
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


class ArchivedTensor:
    """A tensor of which rectangles can be read.

    Reading it from its first row to its last, in order, verifies its checksum: DamagedCheckpointError if it is wrong.
    """

    def __init__(self, path: Path, layout: _Layout):
        self.path, self._layout = path, layout
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
        if rectangle.num_elements == 0:
            return torch.empty(rectangle.size, dtype=layout.dtype)
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
            raise _damaged(self.path, layout.position, "does not have its checksum")


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in its record, in elements; and the record, in bytes from the start of the file."""

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


def archived_tensors(path: Path, offset: int = 0, num_bytes: int | None = None) -> dict[str, ArchivedTensor]:
    """The tensors in an archive that is the file `path`, or `num_bytes` of it from `offset` on.

    Their names are the keys of the mappings around them, joined by dots; "" is that of an archive which is a tensor.
    What is no tensor is left out. Raises CheckpointError if the archive brings what could run a program, or is damaged.
    """
    try:
        archive = _Archive(path, offset, path.stat().st_size if num_bytes is None else num_bytes)
        return {name: ArchivedTensor(path, archive.layout(found)) for name, found in _tensors(archive.content(), "")}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except CheckpointError:
        raise
    except Exception as error:  # What damaged bytes lead to has no common base.
        raise _damaged(path, offset, f"holds no tensor of torch.save ({error})") from error


class _Archive:
    def __init__(self, path: Path, offset: int, num_bytes: int):
        self._path = path
        self._mapped, shift = _mapped(path, offset, num_bytes)
        self._start = offset - shift
        with zipfile.ZipFile(cast(IO[bytes], self._mapped)) as archive:
            self._records = {record.filename.split("/", 1)[-1]: record for record in archive.infolist()}
        if "byteorder" in self._records and self._bytes("byteorder") != b"little":
            raise ValueError("numbers with the most significant byte first")

    def content(self) -> Any:
        return read_inert(self._bytes("data.pkl"), self._path)

    def layout(self, tensor: StandIn) -> _Layout:
        """Of a call that would rebuild a tensor."""
        (_, storage, key, _, num_elements), first, shape, stride = tensor.args[:4]
        dtype = _DTYPES[storage.qualified_name]
        position, length = self._place(f"data/{key}")
        reach = first + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
        is_inside = 0 in shape or reach <= num_elements
        if length != num_elements * dtype.itemsize or min(first, *shape, *stride, 0) < 0 or not is_inside:
            raise ValueError(f"{num_elements} elements in {length} bytes for the shape {list(shape)}")
        return _Layout(dtype, shape, stride, first, self._start + position, length, self._records[f"data/{key}"].CRC)

    def _bytes(self, name: str) -> bytes:
        position, length = self._place(name)
        return self._mapped[position : position + length]

    def _place(self, name: str) -> tuple[int, int]:
        """Where the bytes of a record lie in the mapping, and how many they are."""
        record = self._records[name]
        header = self._mapped[record.header_offset : record.header_offset + _HEADER_BYTES]
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = record.header_offset + _HEADER_BYTES + lengths
        if record.compress_type != zipfile.ZIP_STORED or start + record.file_size > len(self._mapped):
            raise ValueError(f"the record {name} is compressed or cut off")
        return start, record.file_size


def _mapped(path: Path, position: int, num_bytes: int) -> tuple[mmap.mmap, int]:
    """A part of a file, and where it starts in the mapping, which starts at a page."""
    shift = position % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # Copied on write, since torch warns of memory that cannot be written. It is never written.
        mapped = mmap.mmap(file.fileno(), num_bytes + shift, access=mmap.ACCESS_COPY, offset=position - shift)
    return mapped, shift


def _tensors(value: Any, name: str) -> Iterator[tuple[str, StandIn]]:
    if isinstance(value, StandIn) and value.qualified_name == "torch._utils._rebuild_parameter":
        yield from _tensors(value.args[0], name)
    elif isinstance(value, StandIn) and value.qualified_name == "torch._utils._rebuild_tensor_v2":
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))


def _damaged(path: Path, position: int, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path}: what lies at byte {position} {what}; the file is damaged. "
        "Copy it again from where it was saved, or use another checkpoint."
    )
