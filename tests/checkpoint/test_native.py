"""A rank reads its own slices of a checkpoint, each byte once, and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.manager import save
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.placement import logical_shapes, specs_of_rank
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, RunState, load_tensors
from megatron.checkpoint.tiles import TILE_BYTES
from megatron.core.layout import ParallelLayout
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig

# An eighth of every dimension is no power of two, and the vocabulary is odd: padding makes its slices uneven.
LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=48,
    num_attention_heads=8,
    num_attention_heads_kv=2,
    ffn_hidden_size=88,
    vocab_size=1001,
    max_position_embeddings=32,
    use_rms_norm=True,
    glu_activation="swiglu",
    position_embedding_type="rotary",
    tie_embed_logits=False,
)
KINDS = ("model", "optimizer.exp_avg")


def save_whole(root: Path, whole: dict[str, torch.Tensor], tile_bytes: int) -> NativeSource:
    """As one process saves them."""
    regions = [
        replace(region, local_start=region.start)
        for spec in specs_of_rank(LLAMA, ParallelLayout(), 0)
        for region in spec.regions(0, 1)
    ]
    held = [LocalTensor(kind, [region], whole[f"{kind}.{region.name}"]) for kind in KINDS for region in regions]
    info = CheckpointInfo(RunState(iteration=1), LLAMA)
    return NativeSource(save(root, info, held, Axis("world"), tile_bytes=tile_bytes))


def files_with(source: NativeSource, entry: str, rectangle: Rectangle) -> set[str]:
    pieces = source.manifest.entries[entry].pieces
    return {piece.file for piece in pieces if piece.rectangle.intersection(rectangle) is not None}


@pytest.mark.parametrize("tile_bytes", [512, TILE_BYTES])
@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("saved_tp_size", [1, 2, 4])
def test_a_tensor_rank_reads_the_bytes_of_its_own_slices_and_the_headers_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile_bytes: int, tp_size: int, saved_tp_size: int
) -> None:
    """Slices of rows, of columns and of the vocabulary, from one file, or from those that another layout wrote."""
    whole = {f"{kind}.{name}": torch.randn(shape) for kind in KINDS for name, shape in logical_shapes(LLAMA).items()}
    path = save_whole(tmp_path / "whole", whole, tile_bytes).path
    if saved_tp_size > 1:
        plan = plan_resharding(NativeSource(path), ParallelLayout(tp=saved_tp_size))
        path = reshard(plan, tmp_path / "cut", on_bytes=lambda num_bytes: None)
    num_read: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        num_read.append(preadv(descriptor, buffers, offset))
        return num_read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    for tp_rank in range(tp_size):
        held, expected = [], []
        for spec in specs_of_rank(LLAMA, ParallelLayout(tp=tp_size), tp_rank):
            for kind in KINDS:
                expected.append(spec.take({b.name: whole[f"{kind}.{b.name}"] for b in spec.blocks}, tp_rank, tp_size))
                held.append(LocalTensor(kind, spec.regions(tp_rank, tp_size), torch.zeros_like(expected[-1])))
        num_read.clear()
        source = NativeSource(path)
        load_tensors(source, held)
        assert all(torch.equal(local.tensor, want) for local, want in zip(held, expected, strict=True))
        wanted = [
            (local.entry(region), Rectangle(region.start, region.size)) for local in held for region in local.regions
        ]
        files = {file for entry, rectangle in wanted for file in files_with(source, entry, rectangle)}
        own = sum(4 * rectangle.num_elements for _, rectangle in wanted)
        assert sum(num_read) == own + sum(source.manifest.files[name].header_bytes for name in files)
