"""Any source -> any format that can be written: what it will take, and how it is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import torch

from megatron.checkpoint.hf_export import (
    DEFAULT_SHARD_BYTES,
    check_output_folder,
    split_by_size,
    write_hf_folder,
)
from megatron.checkpoint.legacy import plan_legacy_tree, write_legacy_tree
from megatron.checkpoint.legacy.tree import rank_name
from megatron.checkpoint.legacy.writer import LegacyTreePlan
from megatron.checkpoint.model_export import plan_model_export
from megatron.checkpoint.placement import num_virtual_chunks
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.source import Source
from megatron.checkpoint.storage import planned_file_bytes
from megatron.checkpoint.tokenizer_source import tokenizer_of
from megatron.core.layout import ParallelLayout
from megatron.errors import ConfigError

OnBytes: TypeAlias = Callable[[int], object]


@dataclass(frozen=True)
class Target:
    """What is asked for. `layout` has no data parallelism; `layers_per_virtual_stage` None means one stage a rank.

    `model_name` is recorded where the source records none.
    """

    root: Path
    layout: ParallelLayout
    layers_per_virtual_stage: int | None = None
    dtype: torch.dtype | None = None
    model_name: str | None = None
    num_workers: int = 1


@dataclass(frozen=True)
class Conversion:
    """`files` has the bytes of each. `write` does it and returns the folder; it reports the bytes it has written."""

    files: Mapping[str, int]
    contents: str
    num_tensor_bytes: int
    write: Callable[[OnBytes], Path]


def to_megatron(source: Source, target: Target) -> Conversion:
    """One file a rank, optimizer state included."""
    layout = target.layout
    num_chunks = num_virtual_chunks(source.model_config(), layout, target.layers_per_virtual_stage)
    plan = plan_resharding(source, layout, num_chunks=num_chunks, weights_dtype=target.dtype)
    return Conversion(
        {name: planned_file_bytes(pieces) for name, pieces in plan.files.items()},
        f"TP{layout.tp} PP{layout.pp}{_stages(num_chunks)}: {', '.join(plan.kinds)}",
        plan.num_bytes,
        lambda on_bytes: reshard(
            plan, target.root, model_name=target.model_name, num_workers=target.num_workers, on_bytes=on_bytes
        ),
    )


def to_hugging_face(source: Source, target: Target) -> Conversion:
    """Weights, configuration and tokenizer, as transformers loads them; the padding and the optimizer stay behind."""
    _check_no_layout("hf", target)
    check_output_folder(target.root)
    scratch = TemporaryDirectory()
    planned = plan_model_export(source, tokenizer_of(source), Path(scratch.name), dtype=target.dtype)
    weights, tokenizer = planned.weights, planned.tokenizer.files
    shards = split_by_size(weights.tensors, DEFAULT_SHARD_BYTES)

    def write(on_bytes: OnBytes) -> Path:
        with scratch:
            write_hf_folder(source, weights, shards, target.root, other_files=tokenizer, on_bytes=on_bytes)
        return target.root

    return Conversion(
        {f"weights {number} of {len(shards)}": sum(t.num_bytes for t in held) for number, held in enumerate(shards, 1)},
        f"a Hugging Face model: weights, configuration{', tokenizer' if tokenizer else ''}",
        weights.num_bytes,
        write,
    )


def to_megatron_legacy(source: Source, target: Target) -> Conversion:
    """Weights as Megatron-LLM loads them, or Megatron-LM a BERT's: one pickled file a rank."""
    layout = target.layout
    num_chunks = num_virtual_chunks(source.model_config(), layout, target.layers_per_virtual_stage)
    plan = plan_legacy_tree(
        source, layout, num_chunks=num_chunks, weights_dtype=target.dtype, model_name=target.model_name
    )
    return Conversion(
        {
            f"{plan.name}/{rank_name(p, t, layout.pp)}": _legacy_rank_bytes(plan, p)
            for p in range(layout.pp)
            for t in range(layout.tp)
        },
        f"TP{layout.tp} PP{layout.pp}{_stages(num_chunks)} as a tree of {plan.program}: weights",
        plan.num_bytes,
        lambda on_bytes: write_legacy_tree(plan, target.root, on_bytes=on_bytes),
    )


# What --saver knows.
SAVERS: Mapping[str, Callable[[Source, Target], Conversion]] = {
    "megatron": to_megatron,
    "hf": to_hugging_face,
    "megatron_legacy": to_megatron_legacy,
}


def _legacy_rank_bytes(plan: LegacyTreePlan, pipeline_rank: int) -> int:
    """The tensors of a rank, alike on all tensor ranks; torch.save adds little to them."""
    tensors = (tensor for chunk in plan.chunks(pipeline_rank) for tensor in plan.stored_as.tensors(chunk))
    return sum(math.prod(held.local_shape(plan.layout.tp)) * plan.dtype(held).itemsize for held in tensors)


def _stages(num_chunks: int) -> str:
    return f" with {num_chunks} stages a rank" if num_chunks > 1 else ""


def _check_no_layout(saver: str, target: Target) -> None:
    if target.layout.world_size > 1 or target.layers_per_virtual_stage is not None:
        raise ConfigError(f"--saver {saver} writes files without a layout; drop the --target_ flags.")
