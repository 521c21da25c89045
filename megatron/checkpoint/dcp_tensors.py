"""The tensors of a torch.distributed.checkpoint tree, put together from their chunks a slice at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.dcp_metadata import Chunk, read_metadata
from megatron.checkpoint.plan import Rectangle, parts_of
from megatron.checkpoint.torch_archive import ArchivedTensor, archived_tensors
from megatron.errors import DamagedCheckpointError

_MAX_OPENED = 1024
_REMEDY = "Copy the checkpoint again from where it was saved, or use another."


class DcpTensors:
    """See `NamedTensors`; the names are those of the flattened state dictionary.

    Chunks are checked to cover each tensor when the tree is opened; what a file says of a chunk when it is read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tensors = read_metadata(path)
        self._chunk = lru_cache(maxsize=_MAX_OPENED)(self._opened)

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        tensor, wanted = self._tensors[name], Rectangle(tuple(start), tuple(size))
        out = torch.empty(wanted.size, dtype=tensor.dtype)
        for part in parts_of(wanted, [chunk.rectangle for chunk in tensor.chunks]):
            chunk = tensor.chunks[part.piece]
            inner = tuple(s.start for s in part.rectangle.slices_in(chunk.rectangle))
            stored = self._chunk(name, chunk)
            out[part.rectangle.slices_in(wanted)] = stored.read(Rectangle(inner, part.rectangle.size))
        return out

    def _opened(self, name: str, chunk: Chunk) -> ArchivedTensor:
        path = self.path / chunk.file
        stored = archived_tensors(path, chunk.offset, chunk.num_bytes).get("")
        if stored is None:
            raise DamagedCheckpointError(f"{path}: {name} at byte {chunk.offset} is no tensor. {_REMEDY}")
        expected = chunk.rectangle.size, self._tensors[name].dtype
        if (stored.shape, stored.dtype) != expected:
            raise DamagedCheckpointError(
                f"{path}: {name} has shape {list(stored.shape)} and {stored.dtype} at byte {chunk.offset}, not "
                f"{list(expected[0])} and {expected[1]}; the file belongs to another checkpoint. {_REMEDY}"
            )
        return stored
