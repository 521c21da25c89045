"""A file of torch.save that holds named tensors, read a slice at a time."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.torch_archive import ArchivedTensor, archived_tensors
from megatron.checkpoint.unpickle import read_torch_file
from megatron.errors import CheckpointError


class TorchFile:
    """See `NamedTensors`. Mappings in mappings are flattened, their keys joined by dots; what is no tensor is left out.

    A file in the format before zip archives (PyTorch 1.5) is in memory as a whole. Raises CheckpointError if the file
    holds no tensors, is damaged, or brings what could run a program.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tensors: Mapping[str, ArchivedTensor | Tensor]
        if path.is_file() and zipfile.is_zipfile(path):
            self._tensors = archived_tensors(path)
        else:
            self._tensors = dict(_flat(read_torch_file(path), ""))
        if not self._tensors:
            raise CheckpointError(f"{path} holds no tensors; give a file with a model's state dictionary.")

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        tensor = self._tensors[name]
        if isinstance(tensor, ArchivedTensor):
            return tensor.read(Rectangle(tuple(start), tuple(size)))
        slices = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        return tensor[slices].clone(memory_format=torch.contiguous_format)


def _flat(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
