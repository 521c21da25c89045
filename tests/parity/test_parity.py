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
from torch import Tensor

from distributed import run_distributed
from megatron.core.random import DropoutStreams
from megatron.core.sharding import Region
from megatron.core.tensor_parallel import shard_specs
from megatron.model.config import ModelConfig
from megatron.optimizer.config import OptimizerConfig
from megatron.training.step import TrainStep
from reference import FAMILIES, seeded, serial_stage, tiny_config
from training_runs import RECOMPUTE, SEQ_LENGTH, Layout, batches_of_rank, global_batch, make_step

NUM_STEPS = 3
LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD = 1e-3, 0.1, 0.3
ADAM = OptimizerConfig(
    lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adam_eps=1e-8, lr_decay_iters=NUM_STEPS, clip_grad=CLIP_GRAD
)


@dataclass(frozen=True)
class Case:
    axes: tuple[int, int, int]  # tp, pp, dp
    sequence_parallel: bool
    zero_stage: int
    recompute: str
    schedule: str
    model: str
    tied: bool
    biases: bool

    @property
    def layout(self) -> Layout:
        return Layout(*self.axes, self.sequence_parallel, self.zero_stage, self.recompute, self.schedule)

    @property
    def is_possible(self) -> bool:
        """Sequence parallelism needs tensor ranks, and schedules differ only on several pipeline ranks."""
        tp, pp, _ = self.axes
        return (tp > 1 or not self.sequence_parallel) and (pp > 1 or self.schedule == "1f1b")

    @property
    def config(self) -> ModelConfig:
        options = {
            "num_layers": 8 if self.schedule == "interleaved" else 5,
            "tie_embed_logits": self.tied,
            "qkv_bias": self.biases,
            "attention_output_bias": self.biases,
            "mlp_bias": self.biases,
        }
        return tiny_config(**{**MODELS[self.model], **options})

    def __str__(self) -> str:
        tp, pp, dp = self.axes
        flags = [f"tp{tp}pp{pp}dp{dp}", "sp" * self.sequence_parallel, f"zero{self.zero_stage}", self.recompute]
        return "-".join(filter(None, [*flags, self.schedule, self.model, "tied" * self.tied, "biases" * self.biases]))


# Each has what several families have, so that few of them show all that a family can have.
MODELS = {
    "llama": {},
    "gemma, window, qk-norm": {
        "glu_activation": "geglu_tanh",
        "sliding_window_size": 5,
        "qk_layernorm": True,
        "apply_layernorm_1p": True,
        "scale_embeddings": True,
    },
    "falcon 7": FAMILIES["falcon 7"],
    "falcon 40, positions": {
        **FAMILIES["falcon 40"],
        "mlp_activation": "gelu_tanh",
        "position_embedding_type": "absolute",
    },
}

AXES = [(tp, pp, dp) for tp in (1, 2, 4) for pp in (1, 2, 4) for dp in (1, 2) if tp * pp * dp <= 8]
OPTIONS = {
    "axes": AXES,
    "sequence_parallel": [False, True],
    "zero_stage": [0, 1, 2, 3],
    "recompute": list(RECOMPUTE),
    "schedule": ["1f1b", "gpipe", "interleaved"],
    "model": list(MODELS),
    "tied": [False, True],
    "biases": [False, True],
}


def all_cases() -> list[Case]:
    return [case for values in itertools.product(*OPTIONS.values()) if (case := Case(*values)).is_possible]


def matrix_cases() -> list[Case]:
    """Every combination of the parallel options. Variants of the model and of full recompute take turns at random."""
    combinations: dict[tuple, list[Case]] = {}
    for case in all_cases():
        recompute = "full" if case.recompute in ("uniform", "block") else case.recompute
        key = (case.axes, case.sequence_parallel, case.zero_stage, recompute, case.schedule)
        combinations.setdefault(key, []).append(case)
    draw = random.Random(0)
    return [draw.choice(variants) for variants in combinations.values()]


def pairs_of(case: Case) -> Iterator[tuple]:
    named = [(f.name, value) for f, value in zip(fields(case), astuple(case), strict=True)]
    return itertools.combinations(named, 2)


@cache
def covering_cases() -> list[Case]:
    """Greedily picks cases until every pair of option values that can occur together does."""
    pairs = {case: frozenset(pairs_of(case)) for case in all_cases()}
    missing = frozenset().union(*pairs.values())
    draw, chosen = random.Random(0), []
    while missing:
        # The best of some that have a pair which is missing: nearly as few cases as the best of all, much sooner.
        wanted = min(missing, key=repr)
        able = [case for case in pairs if wanted in pairs[case]]
        best = max(draw.sample(able, min(200, len(able))), key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


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
    step = make_step(case.config, case.layout, seeded(case.config), ADAM)
    loss, gradients = first_step(step)
    later = (step.run(batches_of_rank(number, step), number, LEARNING_RATE) for number in range(1, NUM_STEPS))
    losses = [loss, *(result.loss for result in later)]
    return losses, [
        Piece(region, gradient[region.local_slices].clone(), shard.tensor.detach()[region.local_slices].clone())
        for shard, gradient in zip(step.data_parallel.shards, gradients, strict=True)
        for region in shard.regions(step.topology.tp)
    ]


def first_step(step: TrainStep) -> tuple[float, list[Tensor]]:
    """What `TrainStep.run` does, with a look at the gradients of the mean loss before they are clipped and used."""
    batches = batches_of_rank(0, step)
    sums = step.pipeline.train(batches, [DropoutStreams(1, 0, batch.index) for batch in batches])
    result, factor = step.finish(sums)
    gradients = [shard.gradient / result.valid_tokens for shard in step.data_parallel.shards]
    step.update(factor, LEARNING_RATE)
    return result.loss, gradients


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
    ranks = run_distributed(parallel_runs, cases[0].layout.world_size, cases, timeout_s=60 + 20 * len(cases))
    for number, case in enumerate(cases):
        check(case, [results[number] for results in ranks])


def by_world_size(cases: list[Case], batch_size: int) -> list:
    """Cases in groups that share one set of processes."""
    params = []
    for world_size in sorted({case.layout.world_size for case in cases}):
        same = [case for case in cases if case.layout.world_size == world_size]
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
@pytest.mark.parametrize("cases", by_world_size(matrix_cases(), batch_size=16))
def test_training_equals_the_serial_model_in_the_whole_matrix(cases):
    run_and_check(cases)


def test_a_wrong_gradient_would_be_noticed():
    """The bound is tight: an error in the tenth digit of one element fails."""
    whole = torch.ones(4, 4, dtype=torch.float64)
    wrong = whole.clone()
    wrong[1, 2] += 1e-8
    with pytest.raises(AssertionError, match="off by 1.00e-08"):
        assert_close(wrong, whole, (slice(None), slice(None)), "gradient")
