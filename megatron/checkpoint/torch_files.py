"""A file of torch.save that holds named tensors, read a slice at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.unpickle import read_torch_file
from megatron.errors import CheckpointError

# The pages of a mapped file that were touched count as memory of this process until it is mapped anew.
_REMAP_BYTES = 64 * 2**20


class TorchFile:
    """See `NamedTensors`. Mappings in mappings are flattened, their keys joined by dots; what is no tensor is left out.

    Raises CheckpointError if the file holds no tensors, is damaged, or brings what could run a program.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_mapped = zipfile.is_zipfile(path)  # an older file is in memory as a whole
        self._loaded: dict[str, Tensor] = {}
        self._num_read_bytes = 0
        self._facts = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors().items()}
        if not self._facts:
            raise CheckpointError(f"{path} holds no tensors; give a file with a model's state dictionary.")

    def names(self) -> Sequence[str]:
        return list(self._facts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._facts[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._facts[name][1]

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        slices = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        part = self._tensors()[name][slices].clone(memory_format=torch.contiguous_format)
        self._num_read_bytes += part.nbytes
        if self._is_mapped and self._num_read_bytes >= _REMAP_BYTES:
            self._loaded, self._num_read_bytes = {}, 0
        return part

    def _tensors(self) -> dict[str, Tensor]:
        loaded = self._loaded  # another thread may let go of it at any moment
        if not loaded:
            self._loaded = loaded = dict(_flat(read_torch_file(self.path), ""))
        return loaded


def _flat(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
