"""Training steps of a tiny model on any layout, for tests that compare layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.data_parallel import DataParallelConfig
from megatron.core.layout import ParallelLayout
from megatron.core.recompute import RecomputePolicy
from megatron.core.sharding import Region
from megatron.core.topology import Topology
from megatron.data.loader import Batch
from megatron.model.config import ModelConfig
from megatron.model.stage import StageOptions
from megatron.optimizer.config import OptimizerConfig
from megatron.optimizer.optimizers import Optimizer
from megatron.training.build import build_parts, fill_weights
from megatron.training.forward import Pipeline
from megatron.training.step import TrainStep

NUM_MICROBATCHES, MICRO_BATCH_SIZE, SEQ_LENGTH = 8, 2, 16

RECOMPUTE = {
    "none": RecomputePolicy(),
    "selective": RecomputePolicy("selective"),
    "uniform": RecomputePolicy("full", "uniform", 2),
    "block": RecomputePolicy("full", "block", 1),
}


@dataclass(frozen=True)
class Layout:
    """How a step is spread over processes; the model and the data do not depend on it."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0
    recompute: str = "none"
    schedule: str = "1f1b"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


def make_step(
    config: ModelConfig,
    layout: Layout,
    read: Callable[[Region], Tensor],
    optimizer: OptimizerConfig,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
) -> TrainStep:
    """The real training step on this rank, its weights filled by `read`."""
    topology = Topology.create(ParallelLayout(pp=layout.pp, dp=layout.dp, tp=layout.tp))
    options = StageOptions(
        padded_vocab_size=-(-config.vocab_size // (8 * layout.tp)) * 8 * layout.tp,
        sequence_parallel=layout.sequence_parallel,
        recompute=RECOMPUTE[layout.recompute],
    )
    parts = build_parts(
        config,
        topology,
        options,
        DataParallelConfig(zero_stage=layout.zero_stage, compute_dtype=dtype),
        num_chunks=2 if layout.schedule == "interleaved" else 1,
        master_dtype=dtype,
    )
    fill_weights(parts.data_parallel, topology, read)
    pipeline = Pipeline(
        parts,
        topology,
        schedule=layout.schedule,
        compute_dtype=dtype,
        sequence_parallel=layout.sequence_parallel,
    )
    return TrainStep(
        pipeline,
        Optimizer(optimizer, parts.data_parallel.shards),
        topology,
        clip_grad=optimizer.clip_grad,
        seed=seed,
    )


def global_batch(step: int, vocab_size: int) -> list[Batch]:
    """All micro-batches of a step. Their loss masks have different counts, and one is empty."""
    generator = torch.Generator().manual_seed(100 + step)
    batches = []
    for index in range(NUM_MICROBATCHES):
        tokens = torch.randint(vocab_size, (MICRO_BATCH_SIZE, SEQ_LENGTH + 1), generator=generator)
        mask = (torch.rand(MICRO_BATCH_SIZE, SEQ_LENGTH, generator=generator) < index / NUM_MICROBATCHES).float()
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, None, index))
    return batches


def batches_of_rank(number: int, step: TrainStep) -> list[Batch]:
    """This data rank's micro-batches of step `number`."""
    dp = step.topology.dp
    return global_batch(number, step.pipeline.model_config.vocab_size)[dp.rank :: dp.size]
