"""The tensors of a tree's files, mapped into memory and read where they are touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from megatron.checkpoint.legacy.optimizer import find_optimizer_state
from megatron.checkpoint.legacy.tree import Tree, chunks_of, read_rank
from megatron.checkpoint.source import MODEL

_MAPPED_BYTES: Final = 64 * 2**20


class MappedFiles:
    """Opens files when they are asked for, and closes all when `_MAPPED_BYTES` of them have been read.

    Pages that were read count as memory of this process until the file is closed. Threads may share one.
    """

    def __init__(self, tree: Tree, *, with_optimizer: bool):
        self._tree, self._with_optimizer = tree, with_optimizer
        self._open: dict[tuple[int, int], list[Mapping[str, Mapping[str, Tensor]]]] = {}
        self._num_read_bytes = 0

    def tensor(self, rank: tuple[int, int], chunk: int, kind: str, key: str, num_bytes: int) -> Tensor:
        """A tensor of the (pipeline rank, tensor rank)'s file, of which `num_bytes` will be read."""
        if self._num_read_bytes > _MAPPED_BYTES:
            self._open, self._num_read_bytes = {}, 0
        opened = self._open  # another thread may begin anew at any moment
        if rank not in opened:
            opened[rank] = self._chunks(rank)
        self._num_read_bytes += num_bytes
        return opened[rank][chunk][kind][key]

    def _chunks(self, rank: tuple[int, int]) -> list[Mapping[str, Mapping[str, Tensor]]]:
        """Kind -> key -> tensor, of each chunk; with the optimizer's state, weights are its masters if it has any."""
        state = read_rank(self._tree.files[rank])
        chunks = chunks_of(state)
        found = find_optimizer_state(state, chunks) if self._with_optimizer else None
        if found is None:
            return [{MODEL: chunk} for chunk in chunks]
        return [{MODEL: chunk, **kinds} for chunk, kinds in zip(chunks, found.tensors, strict=True)]
