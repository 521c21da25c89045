"""Where the tensors of a file of torch.save lie in it, so that the file is parsed once and nothing of it stays mapped.

Their checksums, which torch.load ignores, are verified when a tensor is opened for the first time. Pages of a mapping
that were touched count as memory of the process for as long as the mapping lives.
"""

from __future__ import annotations

import mmap
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from megatron.checkpoint.unpickle import read_record, read_torch_file
from megatron.errors import DamagedCheckpointError

# A record's own header ends with the lengths of its name and of the padding that follow, two bytes each.
_HEADER_BYTES: Final = 30
# torch.save aligns tensors so; an archive that another program packed again has its records anywhere.
_ALIGNMENT: Final = 64
_CHUNK_BYTES: Final = 2**20


class PlacedTensors:
    """`content` is what `read_torch_file` returns, but its tensors may have no values: `open` maps them.

    They do have values where torch.load cannot say their places: in the old format, in an archive that was packed
    again, and with another byte order.
    """

    def __init__(self, path: Path):
        self._path = path
        self._records = _stored_records(path)
        self._verified: set[int] = set()
        self.content: Any = read_torch_file(path, values=not self._records)

    def open(self, tensor: Tensor) -> Tensor:
        """The values of a tensor of `content`, mapped for as long as the result lives.

        Raises DamagedCheckpointError if they are not what was saved.
        """
        if tensor.device.type != "meta":
            return tensor.detach()
        storage = tensor.untyped_storage()
        position, num_bytes = storage._checkpoint_offset, storage.nbytes()
        if position is None or position not in self._records or self._records[position].num_bytes != num_bytes:
            raise self._damaged(f"has no record of {num_bytes} bytes at byte {position}, where a tensor should be")
        if num_bytes == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        shift = position % mmap.ALLOCATIONGRANULARITY
        with self._path.open("rb") as file:
            if position not in self._verified:
                self._verify(file, position)
                self._verified.add(position)
            # Copied on write, since torch warns of memory that cannot be written. It is never written.
            mapped = mmap.mmap(file.fileno(), num_bytes + shift, access=mmap.ACCESS_COPY, offset=position - shift)
        flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=num_bytes // tensor.dtype.itemsize, offset=shift)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _verify(self, file: BinaryIO, position: int) -> None:
        record, crc32 = self._records[position], 0
        if record.crc32 == 0:  # torch.save can be told to compute none
            return
        file.seek(position)
        for start in range(0, record.num_bytes, _CHUNK_BYTES):
            crc32 = zlib.crc32(file.read(min(_CHUNK_BYTES, record.num_bytes - start)), crc32)
        if crc32 != record.crc32:
            raise self._damaged(f"holds other values in {record.name} than were saved there: the checksum differs")

    def _damaged(self, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"{self._path} {what}; the file is damaged: copy it again from where it was saved."
        )


@dataclass(frozen=True)
class _Record:
    name: str
    num_bytes: int
    crc32: int


def _stored_records(path: Path) -> dict[int, _Record]:
    """By the position of its bytes in the file; none if the file is not as torch.save writes it here."""
    found: dict[int, _Record] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for record in archive.infolist():
                crc32 = record.CRC
                if record.filename.endswith("/byteorder") and read_record(archive, record).decode() != sys.byteorder:
                    return {}
                file.seek(record.header_offset)
                header = file.read(_HEADER_BYTES)
                skipped = int.from_bytes(header[-4:-2], "little") + int.from_bytes(header[-2:], "little")
                position = record.header_offset + _HEADER_BYTES + skipped
                is_packed = record.compress_type != zipfile.ZIP_STORED
                if is_packed or ("/data/" in record.filename and position % _ALIGNMENT):
                    return {}
                found[position] = _Record(record.filename, record.file_size, crc32)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError):
        return {}  # torch.load says what is wrong
    return found
