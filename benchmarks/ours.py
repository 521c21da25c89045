"""Our side of every comparison: a step as `finetune.py` takes it, with `TrainStep` and everything below it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.workload import ADAM, SEED, Size, global_batch
from megatron.core.data_parallel import DataParallelConfig, ZeroStage, materialize
from megatron.core.layout import ParallelLayout
from megatron.core.pipeline.actions import Placement
from megatron.core.sharding import fill
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Topology
from megatron.data.loader import Batch
from megatron.model.init import initial_value
from megatron.model.stage import Stage, StageOptions
from megatron.optimizer.optimizers import Optimizer
from megatron.training.build import assign_layers, build_parts, build_stage, fill_weights
from megatron.training.forward import Pipeline
from megatron.training.step import TrainStep

Step = Callable[[], float | None]
"""Takes one optimizer step and returns its mean loss, or None on a rank that does not know it."""


def our_step(size: Size, layout: ParallelLayout, *, zero_stage: ZeroStage = 0, compile: bool = False) -> Step:
    """The framework at `layout`, from the initial weights that all sides share."""
    serial = layout.world_size == 1 and zero_stage == 0
    topology = Topology.serial() if serial else Topology.create(layout)
    options = StageOptions(padded_vocab_size=size.model.vocab_size, compile=compile)
    parts = build_parts(size.model, topology, options, DataParallelConfig(zero_stage=zero_stage))
    fill_weights(parts.data_parallel, topology, lambda region: initial_value(size.model, SEED, region))
    pipeline = Pipeline(parts, topology, schedule="1f1b", compute_dtype=torch.float32, sequence_parallel=False)
    train = TrainStep(pipeline, Optimizer(ADAM, parts.data_parallel.shards), topology, clip_grad=ADAM.clip_grad, seed=1)
    batches = our_batches(size)[topology.dp.rank :: topology.dp.size]
    return lambda: train.run(batches, 1, ADAM.lr).loss


def our_batches(size: Size) -> list[Batch]:
    """The whole global batch; every label counts."""
    tokens, labels = global_batch(size)
    mask = torch.ones(tokens.shape[1:])
    return [Batch(tokens[i], labels[i], mask, None, i) for i in range(len(tokens))]


def our_stage(size: Size, *, number: int = 0, num_stages: int = 1) -> Stage:
    """A stage of our model as a plain module, for peers that bring their own parallelism; balanced as ours are."""
    topology = Topology.serial()
    layers = assign_layers(size.model, num_stages)
    options = StageOptions(padded_vocab_size=size.model.vocab_size)
    stage = build_stage(size.model, Placement.loop(num_stages), layers, number, topology, options)
    materialize(stage, topology.device)
    specs = shard_specs(stage)
    for name, parameter in stage.named_parameters():
        fill(parameter, specs[name].regions(0, 1), lambda region: initial_value(size.model, SEED, region))
    return stage
