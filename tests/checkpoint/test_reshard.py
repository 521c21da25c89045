"""Rewriting for a layout: memory stays at one chunk, and optimizer state of any kind travels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.checkpoint import CheckpointInfo, LocalTensor, RunState, open_source, save, source
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.placement import specs_of_rank
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.vocabulary import ResizedVocabulary
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Region
from megatron.core.topology import Axis
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=300, max_position_embeddings=16)


def write_checkpoint(root: Path, kinds: tuple[str, ...]) -> None:
    tensors = []
    for spec in specs_of_rank(MODEL, ParallelLayout(), 0):
        for block in spec.blocks:
            origin = (0,) * len(block.global_shape)
            region = Region(block.name, block.global_shape, origin, block.global_shape, origin)
            tensors += [LocalTensor(kind, [region], torch.randn(block.global_shape)) for kind in kinds]
    save(root, CheckpointInfo(RunState(iteration=3), MODEL), tensors, Axis("world"))


@pytest.mark.parametrize("vocab_size", [300, 450])
def test_no_read_is_larger_than_a_chunk_and_every_byte_is_reported(
    tmp_path: Path, monkeypatch, vocab_size: int
) -> None:
    """The embedding has 38400 bytes; whatever is read, written or averaged holds at most 2048 of them."""
    write_checkpoint(tmp_path / "in", ("model", "optimizer.exp_avg"))
    monkeypatch.setattr(source, "_CHUNK_BYTES", 2048)
    sizes: list[int] = []
    read = NativeSource.read

    def recorded(self: NativeSource, *args: object) -> Tensor:
        tensor = read(self, *args)  # type: ignore[arg-type]
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(NativeSource, "read", recorded)
    plan = plan_resharding(ResizedVocabulary(open_source(tmp_path / "in"), vocab_size), ParallelLayout(tp=2, pp=2))
    written: list[int] = []
    reshard(plan, tmp_path / "out", on_bytes=written.append)
    assert max(sizes) <= 2048
    assert sum(written) == plan.num_bytes


def test_momentum_buffers_of_some_tensors_only_travel_as_well(tmp_path: Path) -> None:
    """Kinds are read from the names: nothing here knows the optimizers."""
    write_checkpoint(tmp_path / "in", ("model", "optimizer.momentum_buffer"))
    plan = plan_resharding(open_source(tmp_path / "in"), ParallelLayout(pp=2))
    assert plan.kinds == ("model", "optimizer.momentum_buffer")
    reshard(plan, tmp_path / "out", on_bytes=lambda num_bytes: None)
    before, after = open_source(tmp_path / "in"), open_source(tmp_path / "out")
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        whole = (0,) * len(before.shape(name)), before.shape(name)
        assert torch.equal(before.read(name, *whole), after.read(name, *whole))


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "in", ("optimizer.exp_avg",))
    with pytest.raises(CheckpointError, match=r"model\.embedding\.position\.weight is missing; .* and \d+ more"):
        plan_resharding(open_source(tmp_path / "in"), ParallelLayout())
