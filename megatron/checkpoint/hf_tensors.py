"""Which rows of which logical tensors a stored tensor holds: the same description for reading and for writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from megatron.checkpoint.fused_qkv import RowRun, grouped_qkv, stacked
from megatron.checkpoint.hf_family import Family, StoredModule, module_and_layer
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig

ReadSlice: TypeAlias = Callable[[Sequence[int], Sequence[int]], Tensor]
ReadPart: TypeAlias = Callable[[str, Sequence[int], Sequence[int]], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a Hugging Face folder: rows of logical tensors, one run after another, perhaps transposed.

    The `part` of a run is the native name of a logical tensor; `columns` is its shape behind the rows.
    """

    name: str
    runs: tuple[RowRun, ...]
    columns: tuple[int, ...]
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows = (sum(run.num_rows for run in self.runs), *self.columns)
        return rows[::-1] if self.is_transposed else rows

    @property
    def parts(self) -> tuple[str, ...]:
        """The native names of the logical tensors, in the order in which they first appear."""
        return tuple(dict.fromkeys(run.part for run in self.runs))

    def read_part(self, part: str, start: Sequence[int], size: Sequence[int], read: ReadSlice) -> Tensor:
        """The rectangle ``start, size`` of a logical tensor, contiguous; `read` gives rectangles of this one."""
        pieces = []
        for run in self.runs:
            cut = run.within_part(start[0], size[0]) if run.part == part else None
            if cut is not None:
                place, extent = (cut.fused_row, *start[1:]), (cut.num_rows, *size[1:])
                pieces.append(read(place[::-1], extent[::-1]).t() if self.is_transposed else read(place, extent))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0].contiguous()

    def read_rows(self, first: int, num_rows: int, read: ReadPart) -> Tensor:
        """The rows [first, first + num_rows) of this tensor, contiguous; `read` gives rectangles of logical ones."""
        if self.is_transposed:
            pieces = [read(run.part, (run.part_row, first), (run.num_rows, num_rows)) for run in self.runs]
            return _joined(pieces).t().contiguous()
        cuts = [cut for run in self.runs if (cut := run.within_fused(first, num_rows)) is not None]
        origin = (0,) * len(self.columns)
        return _joined([read(cut.part, (cut.part_row, *origin), (cut.num_rows, *self.columns)) for cut in cuts])


def stored_tensors(
    family: Family, model: ModelConfig, logical: Mapping[str, tuple[int, ...]]
) -> tuple[StoredTensor, ...]:
    """The tensors that hold a model in a family's format, in the order of its `logical` tensors (name and shape).

    Raises CheckpointError if the format has no place for one of them.
    """
    modules = {part: module for module in family.modules for part in module.parts}
    described: dict[str, StoredTensor] = {}
    for name in logical:
        module_name, kind, layer = module_and_layer(name)
        if module_name not in modules:
            raise CheckpointError(
                f"{name} has no place in Hugging Face's format of {family.model_type}; "
                "keep the checkpoint in the native format."
            )
        module = modules[module_name]
        parts = [f"{part}.{kind}" if layer is None else f"{part}.{kind}".format(i=layer) for part in module.parts]
        stored = f"{module.name}.{kind}" if layer is None else f"{module.name}.{kind}".format(i=layer)
        if stored not in described:
            described[stored] = _described(stored, module, parts, logical, model)
    return tuple(described.values())


def _described(
    name: str, module: StoredModule, parts: Sequence[str], logical: Mapping[str, tuple[int, ...]], model: ModelConfig
) -> StoredTensor:
    columns = logical[parts[0]][1:]
    if module.order == "grouped":
        native = dict(zip("qkv", parts, strict=True))
        groups = grouped_qkv(model.num_attention_heads, model.num_attention_heads_kv, model.kv_channels)
        runs = tuple(RowRun(native[run.part], run.part_row, run.fused_row, run.num_rows) for run in groups)
    else:
        runs = stacked({part: logical[part][0] for part in parts})
    return StoredTensor(name, runs, columns, is_transposed=module.transposed and len(columns) == 1)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
