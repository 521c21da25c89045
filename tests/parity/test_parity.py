"""Every layout trains the serial model: loss, each gradient, and each parameter after three AdamW steps, in float64.

The serial side is a plain loop over the whole model with torch's own clipping and AdamW; the parallel side
is `training.step.TrainStep`. Both start from the same weights and see the same global batches.

CI runs cases that cover every pair of options; ``pytest -m slow tests/parity`` runs the whole matrix.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from distributed import run_distributed
from reference import seeded, serial_stage, tiny_config
from torch import Tensor

from megatron.core.data_parallel import DataParallelConfig
from megatron.core.layout import ParallelLayout
from megatron.core.recompute import RecomputePolicy
from megatron.core.sharding import Region
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Topology
from megatron.data.loader import Batch
from megatron.model.config import ModelConfig
from megatron.model.stage import StageOptions
from megatron.optimizer.config import OptimizerConfig
from megatron.optimizer.optimizers import Optimizer
from megatron.training.build import build_parts, fill_weights
from megatron.training.forward import Pipeline
from megatron.training.step import TrainStep

NUM_MICROBATCHES, MICRO_BATCH_SIZE, SEQ_LENGTH, NUM_STEPS = 8, 2, 16, 3
LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD = 1e-3, 0.1, 0.3
ADAM = OptimizerConfig(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adam_eps=1e-8, lr_decay_iters=NUM_STEPS)

RECOMPUTE = {
    "none": RecomputePolicy(),
    "selective": RecomputePolicy("selective"),
    "uniform": RecomputePolicy("full", "uniform", 2),
    "block": RecomputePolicy("full", "block", 1),
}


@dataclass(frozen=True)
class Case:
    layout: tuple[int, int, int]  # tp, pp, dp
    sequence_parallel: bool
    zero_stage: int
    recompute: str
    schedule: str
    tied: bool
    biases: bool

    @property
    def world_size(self) -> int:
        tp, pp, dp = self.layout
        return tp * pp * dp

    @property
    def is_possible(self) -> bool:
        """Sequence parallelism needs tensor ranks, and schedules differ only on several pipeline ranks."""
        tp, pp, _ = self.layout
        return (tp > 1 or not self.sequence_parallel) and (pp > 1 or self.schedule == "1f1b")

    @property
    def config(self) -> ModelConfig:
        return tiny_config(
            num_layers=8 if self.schedule == "interleaved" else 5,
            tie_embed_logits=self.tied,
            qkv_bias=self.biases,
            attention_output_bias=self.biases,
            mlp_bias=self.biases,
        )

    def __str__(self) -> str:
        tp, pp, dp = self.layout
        flags = [f"tp{tp}pp{pp}dp{dp}", "sp" * self.sequence_parallel, f"zero{self.zero_stage}", self.recompute]
        return "-".join(filter(None, [*flags, self.schedule, "tied" * self.tied, "biases" * self.biases]))


LAYOUTS = [(tp, pp, dp) for tp in (1, 2, 4) for pp in (1, 2, 4) for dp in (1, 2) if tp * pp * dp <= 8]
OPTIONS = {
    "layout": LAYOUTS,
    "sequence_parallel": [False, True],
    "zero_stage": [0, 1, 2, 3],
    "recompute": list(RECOMPUTE),
    "schedule": ["1f1b", "gpipe", "interleaved"],
    "tied": [False, True],
    "biases": [False, True],
}


def all_cases() -> list[Case]:
    return [case for values in itertools.product(*OPTIONS.values()) if (case := Case(*values)).is_possible]


def pairs_of(case: Case) -> Iterator[tuple]:
    named = [(f.name, value) for f, value in zip(fields(case), astuple(case), strict=True)]
    return itertools.combinations(named, 2)


def covering_cases() -> list[Case]:
    """Greedily picks cases until every pair of option values that can occur together does."""
    cases = all_cases()
    random.Random(0).shuffle(cases)
    missing = {pair for case in cases for pair in pairs_of(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: sum(pair in missing for pair in pairs_of(case)))
        chosen.append(best)
        missing -= set(pairs_of(best))
    return chosen


def global_batch(step: int, vocab_size: int) -> list[Batch]:
    """All micro-batches of a step. Their loss masks have different counts, and one is empty."""
    generator = torch.Generator().manual_seed(100 + step)
    batches = []
    for index in range(NUM_MICROBATCHES):
        tokens = torch.randint(vocab_size, (MICRO_BATCH_SIZE, SEQ_LENGTH + 1), generator=generator)
        mask = (torch.rand(MICRO_BATCH_SIZE, SEQ_LENGTH, generator=generator) < index / NUM_MICROBATCHES).float()
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, None, index))
    return batches


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor on some rank: its first gradient, and its values after the last step."""

    region: Region
    gradient: Tensor
    parameter: Tensor


@cache
def serial_run(config: ModelConfig) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, first gradients and final parameters by logical name."""
    stage = serial_stage(config, seeded(config))
    named = dict(stage.named_parameters())
    matrices, vectors = ([p for p in named.values() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=1e-8)
    losses, gradients = [], {}
    for step in range(NUM_STEPS):
        batches = global_batch(step, config.vocab_size)
        valid = sum(batch.loss_mask.sum() for batch in batches)
        loss = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            logits = stage(batch.tokens, SEQ_LENGTH).transpose(0, 1)
            per_token = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            loss = loss + (per_token * batch.loss_mask.flatten()).sum() / valid
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = by_logical_name(stage, {name: p.grad for name, p in named.items()})
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), CLIP_GRAD)
        assert norm > CLIP_GRAD, "clipping has to be active"
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, by_logical_name(stage, {name: p.detach() for name, p in named.items()})


def by_logical_name(stage: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    specs = shard_specs(stage)
    return {
        region.name: tensors[name][region.local_slices].clone()
        for name, spec in specs.items()
        for region in spec.regions(0, 1)
    }


def parallel_runs(cases: list[Case]) -> list[tuple[list[float], list[Piece]]]:
    """On one rank: every case in turn, in one process group."""
    return [parallel_run(case) for case in cases]


def parallel_run(case: Case) -> tuple[list[float], list[Piece]]:
    tp, pp, dp = case.layout
    topology = Topology.create(ParallelLayout(pp=pp, dp=dp, tp=tp))
    config = case.config
    options = StageOptions(
        padded_vocab_size=-(-config.vocab_size // (8 * tp)) * 8 * tp,
        sequence_parallel=case.sequence_parallel,
        recompute=RECOMPUTE[case.recompute],
    )
    parts = build_parts(
        config,
        topology,
        options,
        DataParallelConfig(zero_stage=case.zero_stage, compute_dtype=torch.float64),
        num_chunks=2 if case.schedule == "interleaved" else 1,
        master_dtype=torch.float64,
    )
    shards = parts.data_parallel.shards
    fill_weights(parts.data_parallel, topology, seeded(config))
    pipeline = Pipeline(
        parts,
        topology,
        schedule=case.schedule,
        compute_dtype=torch.float64,
        sequence_parallel=case.sequence_parallel,
    )
    step = TrainStep(pipeline, Optimizer(ADAM, shards), topology, clip_grad=CLIP_GRAD, seed=1)
    first = one_gradient(step, topology, config)
    losses = [
        step.run(batches_of_rank(number, topology, config), number, LEARNING_RATE).loss for number in range(NUM_STEPS)
    ]
    return losses, [
        Piece(region, gradient[region.local_slices].clone(), shard.tensor.detach()[region.local_slices].clone())
        for shard, gradient in zip(shards, first, strict=True)
        for region in shard.regions(topology.tp)
    ]


def batches_of_rank(number: int, topology: Topology, config: ModelConfig) -> list[Batch]:
    return global_batch(number, config.vocab_size)[topology.dp.rank :: topology.dp.size]


def one_gradient(step: TrainStep, topology: Topology, config: ModelConfig) -> list[Tensor]:
    """The gradient of the first mean loss, as `TrainStep` finishes it, with nothing updated."""
    sums = step.pipeline.train(batches_of_rank(0, topology, config), [None] * (NUM_MICROBATCHES // topology.dp.size))
    result, _ = step.finish(sums)
    gradients = [shard.tensor.grad / result.valid_tokens for shard in step.data_parallel.shards]
    step.data_parallel.refresh()
    step.data_parallel.zero_gradients()
    return gradients


def check(case: Case, ranks: list[tuple[list[float], list[Piece]]]) -> None:
    losses, gradients, parameters = serial_run(case.config)
    covered = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for rank_losses, pieces in ranks:
        assert rank_losses == pytest.approx(losses, rel=1e-12), case
        for piece in pieces:
            where = piece.region.global_slices
            assert_close(piece.gradient, gradients[piece.region.name], where, f"{case}: gradient {piece.region}")
            assert_close(piece.parameter, parameters[piece.region.name], where, f"{case}: parameter {piece.region}")
            covered[piece.region.name][where] += 1
    assert all((count > 0).all() for count in covered.values()), f"{case}: some rows were on no rank"


def assert_close(actual: Tensor, whole: Tensor, where: tuple[slice, ...], what: str) -> None:
    """The bound of the parity law: max |a - b| <= 1e-9 max |a| + 1e-12 over the logical tensor."""
    error, scale = (actual - whole[where]).abs().max(), whole.abs().max()
    assert error <= 1e-9 * scale + 1e-12, f"{what}: off by {error:.2e} where values reach {scale:.2e}"


def run_and_check(cases: list[Case]) -> None:
    ranks = run_distributed(parallel_runs, cases[0].world_size, cases, timeout_s=60 + 20 * len(cases))
    for number, case in enumerate(cases):
        check(case, [results[number] for results in ranks])


def by_world_size(cases: list[Case], batch_size: int) -> list:
    """Cases in groups that share one set of processes."""
    params = []
    for world_size in sorted({case.world_size for case in cases}):
        same = [case for case in cases if case.world_size == world_size]
        for start in range(0, len(same), batch_size):
            params.append(pytest.param(same[start : start + batch_size], id=f"world{world_size}-{start // batch_size}"))
    return params


def test_the_chosen_cases_cover_every_pair_of_options():
    chosen = covering_cases()
    assert len(chosen) >= 40
    possible = {pair for case in all_cases() for pair in pairs_of(case)}
    assert possible == {pair for case in chosen for pair in pairs_of(case)}


@pytest.mark.parametrize("cases", by_world_size(covering_cases(), batch_size=4))
def test_training_equals_the_serial_model(cases):
    run_and_check(cases)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cases", by_world_size(all_cases(), batch_size=16))
def test_training_equals_the_serial_model_in_the_whole_matrix(cases):
    run_and_check(cases)


def test_a_wrong_gradient_would_be_noticed():
    """The bound is tight: an error in the tenth digit of one element fails."""
    whole = torch.ones(4, 4, dtype=torch.float64)
    wrong = whole.clone()
    wrong[1, 2] += 1e-8
    with pytest.raises(AssertionError, match="off by 1.00e-08"):
        assert_close(wrong, whole, (slice(None), slice(None)), "gradient")
