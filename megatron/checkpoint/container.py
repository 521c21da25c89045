"""The safetensors container: eight bytes of header length, a JSON header, then the tensors one after another.

The layout is computed from shapes alone, so that a file can be written tensor by tensor, and the header is parsed
without the data, so that a slice can be read without the rest. The `safetensors` library reads what is written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH_BYTES = 8

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. `offset` counts bytes from the start of the data section."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def build_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, StoredTensor]]:
    """The first bytes of a file (length included) that holds `tensors` in this order, and where each one will lie."""
    placed, offset = {}, 0
    for key, (dtype, shape) in tensors.items():
        placed[key] = StoredTensor(dtype, shape, offset)
        offset += placed[key].num_bytes
    header = {
        key: {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (tensor.offset, tensor.offset + tensor.num_bytes),
        }
        for key, tensor in placed.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # keeps the data aligned
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, placed


def parse_header(header: bytes) -> dict[str, StoredTensor]:
    """The inverse of `build_header`, for a header that is known to be intact."""
    entries = json.loads(header[LENGTH_BYTES:])
    return {
        key: StoredTensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0])
        for key, entry in entries.items()
    }


def data_end(tensors: Mapping[str, StoredTensor]) -> int:
    """Length of the data section in bytes."""
    return max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=0)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; writing to the view writes to the tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
