"""The tensors of a tree's files: each file is parsed once, and a tensor mapped while some of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron.checkpoint.legacy.optimizer import find_optimizer_state
from megatron.checkpoint.legacy.tree import Tree, check_rank, chunks_of
from megatron.checkpoint.source import MODEL
from megatron.checkpoint.torch_places import PlacedTensors


@dataclass(frozen=True)
class _Rank:
    """`chunks`: kind -> key -> tensor, of each model chunk."""

    file: PlacedTensors
    chunks: list[Mapping[str, Mapping[str, Tensor]]]


class MappedFiles:
    """Opens files when they are asked for. Threads may share one."""

    def __init__(self, tree: Tree, *, with_optimizer: bool):
        self._tree, self._with_optimizer = tree, with_optimizer
        self._ranks: dict[tuple[int, int], _Rank] = {}

    def tensor(self, rank: tuple[int, int], chunk: int, kind: str, key: str) -> Tensor:
        """A tensor of the (pipeline rank, tensor rank)'s file, mapped for as long as it lives."""
        if rank not in self._ranks:
            self._ranks[rank] = self._open(rank)
        opened = self._ranks[rank]
        return opened.file.open(opened.chunks[chunk][kind][key])

    def _open(self, rank: tuple[int, int]) -> _Rank:
        """With the optimizer's state, weights are its masters if it has any."""
        file = PlacedTensors(self._tree.files[rank])
        state = check_rank(file.content, self._tree.files[rank])
        chunks = chunks_of(state)
        found = find_optimizer_state(state, chunks) if self._with_optimizer else None
        kinds = [{}] * len(chunks) if found is None else found.tensors
        return _Rank(file, [{MODEL: chunk, **kind} for chunk, kind in zip(chunks, kinds, strict=True)])
