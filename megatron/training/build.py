"""Builds what a rank runs: its stages, filled from wherever the weights come from, and made data parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config import ParallelConfig
from megatron.core.data_parallel import DataParallel, DataParallelConfig
from megatron.core.layout import place_layers
from megatron.core.pipeline.actions import Placement
from megatron.core.pipeline.simulation import Costs, StageCosts
from megatron.core.recompute import RecomputePolicy
from megatron.core.sharding import Region, fill
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Topology
from megatron.model.config import ModelConfig
from megatron.model.flops import head_cost_in_layers
from megatron.model.stage import Stage, StageOptions


@dataclass(frozen=True)
class PipelineParts:
    """This rank's stages by their number in the model, and what makes them train."""

    placement: Placement
    layers: tuple[range, ...]
    costs: Costs
    stages: dict[int, Stage]
    data_parallel: DataParallel


def build_parts(
    config: ModelConfig,
    topology: Topology,
    options: StageOptions,
    data_parallel: DataParallelConfig,
    *,
    num_chunks: int = 1,
    master_dtype: torch.dtype = torch.float32,
) -> PipelineParts:
    """Stages on the meta device, then allocated and sharded: no rank ever holds what it does not train.

    Weights are zero until `fill_weights`.
    """
    placement = Placement.loop(topology.pp.size, num_chunks)
    layers = assign_layers(config, placement.num_stages, num_chunks=num_chunks)
    stages = {
        number: build_stage(config, placement, layers, number, topology, options, dtype=master_dtype)
        for number in placement.stages_of(topology.pp.rank)
    }
    specs = [shard_specs(stage) for stage in stages.values()]
    units = [stage.units() for stage in stages.values()]
    engine = DataParallel(list(stages.values()), specs, units, topology, data_parallel)
    return PipelineParts(placement, layers, stage_costs(config, layers, options.recompute), stages, engine)


def assign_layers(config: ModelConfig, num_stages: int, *, num_chunks: int = 1) -> tuple[range, ...]:
    """Layers per stage, balanced with the head counted; interleaved stages get equal numbers, as asked for."""
    head_cost = head_cost_in_layers(config) if num_stages > 1 and num_chunks == 1 else 0.0
    return place_layers(config.num_layers, num_stages, head_cost=head_cost)


def recompute_policy(parallel: ParallelConfig) -> RecomputePolicy:
    """The policy that the recompute flags describe."""
    return RecomputePolicy(
        parallel.recompute_granularity, parallel.recompute_method or "uniform", parallel.recompute_num_layers
    )


def stage_costs(config: ModelConfig, layers: Sequence[range], recompute: RecomputePolicy) -> Costs:
    """Times of the stages in units of a layer's forward pass; matmuls take twice as long backward."""
    costs = []
    for number, held in enumerate(layers):
        forward = len(held) + (head_cost_in_layers(config) if number == len(layers) - 1 else 0.0)
        costs.append(StageCosts(forward, forward + recompute.num_recomputed(len(held)), forward))
    return Costs(tuple(costs))


def build_stage(
    config: ModelConfig,
    placement: Placement,
    layers: Sequence[range],
    number: int,
    topology: Topology,
    options: StageOptions,
    *,
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """Stage `number` of the model for this tensor rank, on the meta device."""
    with torch.device("meta"):
        return Stage(
            config,
            layers[number],
            is_first=number == 0,
            is_last=number == placement.num_stages - 1,
            axis=topology.tp,
            options=options,
        ).to(dtype)


def fill_weights(data_parallel: DataParallel, topology: Topology, read: Callable[[Region], Tensor]) -> None:
    """Fills this rank's masters region by region and lets the stages compute with them."""
    for shard in data_parallel.shards:
        fill(shard.tensor.detach(), shard.regions(topology.tp), read)
    data_parallel.refresh()
