"""The global norm against the norm of the logical tensors, however they are cut, copied and padded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distributed import run_distributed
from megatron.core.collectives import all_reduce
from megatron.core.data_parallel import Shard
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Block, ShardSpec
from megatron.core.topology import Topology
from megatron.optimizer.grad_norm import GradientNorm, clip_factor, scale_gradients

# Four query heads and one key/value head of two features each, so that tensor ranks copy keys and values.
QKV = ShardSpec((Block("q", (8, 3), units=4), Block("k", (2, 3), units=1), Block("v", (2, 3), units=1)), dim=0)
DOWN = ShardSpec((Block("down", (3, 12), units=12),), dim=1)
NORM = ShardSpec((Block("norm", (3,)),), gradient="partial")
EMBEDDING = ShardSpec((Block("embedding", (7, 3), units=7, padded_units=8),), dim=0)
SPECS = {"qkv": QKV, "down": DOWN, "norm": NORM, "embedding": EMBEDDING}


def logical_gradients(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    blocks = [block for spec in SPECS.values() for block in spec.blocks]
    return {b.name: torch.randn(b.global_shape, generator=generator, dtype=torch.float64).to(dtype) for b in blocks}


def make_shards(topology: Topology, *, sharded: bool, dtype: torch.dtype = torch.float64) -> list[Shard]:
    """What this rank holds when all tensors are on the first pipeline rank and the last one has a tied copy."""
    gradients, shards = logical_gradients(dtype), []
    specs = SPECS if topology.pp.is_first else {"embedding": replace(EMBEDDING, tied="copy")}
    index, count = (topology.dp.rank, topology.dp.size) if sharded else (0, 1)
    for name, spec in specs.items():
        whole = spec.take(gradients, topology.tp.rank, topology.tp.size)
        rows = -(-len(whole) // count)
        local = whole[index * rows : (index + 1) * rows]
        shards.append(Shard(name, spec, torch.zeros_like(local), index, count, trainable=True))
        shards[-1].tensor.grad = local.clone()
    return shards


def serial_norm() -> float:
    return math.sqrt(sum((gradient**2).sum().item() for gradient in logical_gradients().values()))


def norm_of(shards: Sequence[Shard], topology: Topology | None = None) -> float:
    topology = topology or Topology.serial()
    return math.sqrt(all_reduce(GradientNorm(shards, topology).local_square(), topology.world).item())


def norm_on(layout: ParallelLayout, sharded: bool) -> float:
    topology = Topology.create(layout)
    return norm_of(make_shards(topology, sharded=sharded), topology)


LAYOUTS = [ParallelLayout(tp=2, dp=2), ParallelLayout(tp=2, pp=2), ParallelLayout(dp=4), ParallelLayout(tp=4)]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_copies_shards_and_padding_give_the_serial_norm(layout: ParallelLayout, sharded: bool) -> None:
    norms = run_distributed(norm_on, layout.world_size, layout, sharded)
    assert len(set(norms)) == 1  # a factor that differed between ranks would let replicas drift apart
    assert norms[0] == pytest.approx(serial_norm(), rel=1e-14)


def test_one_process_gives_the_norm_of_all_gradients() -> None:
    assert norm_of(make_shards(Topology.serial(), sharded=False)) == pytest.approx(serial_norm(), rel=1e-14)


def test_the_norm_of_a_large_fp32_gradient_does_not_suffer_from_its_size() -> None:
    """Added up one by one in fp32, four million squares are off by 1e-4; in pieces of 2**18 by less than 5e-6."""
    gradient = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    spec = ShardSpec((Block("w", (2048, 2048)),))
    shard = Shard("w", spec, torch.empty(2048, 2048), index=0, count=1, trainable=True)
    shard.tensor.grad = gradient
    assert norm_of([shard]) == pytest.approx(gradient.double().norm().item(), rel=5e-6)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(value: float) -> None:
    shards = make_shards(Topology.serial(), sharded=False)
    shards[0].gradient[0, 0] = value
    assert not math.isfinite(norm_of(shards))


def test_frozen_shards_and_shards_without_gradient_rows_do_not_count() -> None:
    (qkv, *_) = make_shards(Topology.serial(), sharded=False)
    empty = Shard("empty", NORM, torch.empty(0), index=3, count=4, trainable=True)
    empty.tensor.grad = torch.empty(0)
    frozen = Shard("frozen", NORM, torch.ones(3), index=0, count=1, trainable=False)
    assert norm_of([qkv, empty, frozen]) == pytest.approx(qkv.gradient.norm().item(), rel=1e-14)


def test_a_rank_that_trains_nothing_has_norm_zero() -> None:
    assert norm_of([]) == 0.0


@pytest.mark.parametrize(
    ("norm", "max_norm", "factor"),
    [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (0.0, 1.0, 1.0), (4.0, 0.0, 1.0), (math.inf, 1.0, 0.0)],
)
def test_the_clip_factor_brings_larger_norms_down_to_the_maximum(norm: float, max_norm: float, factor: float) -> None:
    # The constant in the denominator makes the factor smaller by 1e-6 / norm.
    assert clip_factor(norm, max_norm) == pytest.approx(factor, rel=1e-6)


def test_scaled_gradients_have_the_scaled_norm() -> None:
    topology = Topology.serial()
    shards = make_shards(topology, sharded=False)
    scale_gradients(shards, clip_factor(norm_of(shards), 1.0))
    assert norm_of(shards) == pytest.approx(1.0, rel=1e-6)
