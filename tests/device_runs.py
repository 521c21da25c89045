"""The real training step on one device, CPU or GPU: only the device differs between a GPU test and its twin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron.core.data_parallel import DataParallelConfig, ZeroStage
from megatron.core.layout import ParallelLayout
from megatron.core.recompute import RecomputePolicy
from megatron.core.topology import Topology
from megatron.data.loader import Batch
from megatron.model.attention_kernels import AttentionKernel, sdpa_attention
from megatron.model.config import ModelConfig
from megatron.model.stage import StageOptions
from megatron.optimizer.config import OptimizerConfig
from megatron.optimizer.optimizers import Optimizer
from megatron.training.build import build_parts, fill_weights
from megatron.training.forward import Pipeline
from megatron.training.step import TrainStep
from reference import seeded

ADAM = OptimizerConfig(lr=1e-3, weight_decay=0.1)


@dataclass(frozen=True)
class Options:
    """How the step is computed; the model, its weights and its data do not depend on it."""

    compute_dtype: torch.dtype = torch.float32
    zero_stage: ZeroStage = 0
    recompute: RecomputePolicy = field(default_factory=RecomputePolicy)
    kernel: AttentionKernel = sdpa_attention


@dataclass(frozen=True)
class Trained:
    """What came of some steps, on the CPU. `peak_bytes` is the most that they held of a GPU's memory, 0 without one."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]
    peak_bytes: int


@contextmanager
def step_on(device: str, config: ModelConfig, options: Options) -> Iterator[TrainStep]:
    """A training step on one process with a process group of its own: NCCL on a GPU."""
    topology = Topology.create(ParallelLayout(), device)
    try:
        stage_options = StageOptions(
            padded_vocab_size=-(-config.vocab_size // 128) * 128, recompute=options.recompute, kernel=options.kernel
        )
        engine = DataParallelConfig(zero_stage=options.zero_stage, compute_dtype=options.compute_dtype)
        parts = build_parts(config, topology, stage_options, engine)
        fill_weights(parts.data_parallel, topology, seeded(config))
        pipeline = Pipeline(
            parts, topology, schedule="1f1b", compute_dtype=options.compute_dtype, sequence_parallel=False
        )
        optimizer = Optimizer(ADAM, parts.data_parallel.shards)
        yield TrainStep(pipeline, optimizer, topology, clip_grad=ADAM.clip_grad, seed=1)
    finally:
        topology.close()


def train(device: str, config: ModelConfig, options: Options, *, num_steps: int = 3) -> Trained:
    held_before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held_before = torch.cuda.memory_allocated()
    with step_on(device, config, options) as step:
        results = [
            step.run(batches(number, config, step.topology.device), iteration=number, lr=ADAM.lr)
            for number in range(1, num_steps + 1)
        ]
        weights = {shard.name: shard.tensor.detach().cpu().clone() for shard in step.data_parallel.shards}
    return Trained(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        weights=weights,
        peak_bytes=torch.cuda.max_memory_allocated() - held_before if device == "cuda" else 0,
    )


def batches(step: int, config: ModelConfig, device: torch.device, *, num_microbatches: int = 2) -> list[Batch]:
    """Drawn on the CPU, so that every device gets the same. One label in four does not count."""
    generator = torch.Generator().manual_seed(step)
    seq_length, drawn = config.max_position_embeddings, []
    for index in range(num_microbatches):
        tokens = torch.randint(config.vocab_size, (2, seq_length + 1), generator=generator)
        mask = (torch.rand(2, seq_length, generator=generator) < 0.75).float()
        drawn.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, None, index).to(device))
    return drawn


def with_dropout(config: ModelConfig) -> ModelConfig:
    return replace(config, hidden_dropout=0.1, attention_dropout=0.1)
