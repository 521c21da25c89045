"""BERT's training step is the serial model's on every layout, and however the global batch is cut: in float64.

The serial side is a plain loop over samples: torch's mean cross-entropy over all masked tokens of the global batch plus
its mean over all samples, torch's clipping and AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed import run_distributed
from megatron.core.random import DropoutStreams
from megatron.core.sharding import Region
from megatron.core.tensor_parallel import shard_specs
from megatron.data.loader import Batch, batches_for_step
from megatron.optimizer.config import OptimizerConfig
from megatron.training.step import TrainStep, totals
from reference import BERT, seeded, serial_stage, tiny_config
from sentence_files import SENTENCE_VOCAB_SIZE, open_pairs, write_sentences
from training_runs import Layout, make_step

NUM_STEPS, GLOBAL_BATCH_SIZE, SEQ_LENGTH = 3, 8, 24
CLIP_GRAD, LEARNING_RATE = 0.3, 1e-3
ADAM = OptimizerConfig(lr=LEARNING_RATE, weight_decay=0.1, lr_decay_iters=NUM_STEPS, clip_grad=CLIP_GRAD)
CONFIG = tiny_config(**BERT, num_layers=4)


@dataclass(frozen=True)
class Case:
    layout: Layout
    micro_batch_size: int


CASES = {
    1: [Case(Layout(), 1), Case(Layout(recompute="uniform"), 8)],
    2: [
        Case(Layout(tp=2), 2),
        Case(Layout(tp=2, sequence_parallel=True, recompute="selective"), 4),
        Case(Layout(pp=2), 1),
        Case(Layout(pp=2, schedule="interleaved"), 2),
        Case(Layout(dp=2), 2),
        Case(Layout(dp=2, zero_stage=1), 4),
        Case(Layout(dp=2, zero_stage=3), 1),
    ],
    4: [
        Case(Layout(tp=2, pp=2, sequence_parallel=True), 2),
        Case(Layout(pp=2, dp=2, zero_stage=2), 1),
        Case(Layout(tp=2, dp=2, sequence_parallel=True, zero_stage=3), 2),
    ],
}


@dataclass(frozen=True)
class Outcome:
    """Losses of tokens and sentences of each step, an evaluation after them, and pieces of this rank's weights."""

    losses: list[tuple[float, float]]
    evaluation: tuple[float, float]
    pieces: list[tuple[Region, Tensor, Tensor]]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("data") / "sentences")


def batches_of(prefix: Path, number: int, case: Case, rank: int) -> list[Batch]:
    dataset = open_pairs(prefix, (NUM_STEPS + 1) * GLOBAL_BATCH_SIZE, SEQ_LENGTH)
    assert CONFIG.vocab_size == SENTENCE_VOCAB_SIZE
    dp = case.layout.dp
    return batches_for_step(
        dataset,
        number * GLOBAL_BATCH_SIZE,
        micro_batch_size=case.micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=dp,
        num_microbatches=GLOBAL_BATCH_SIZE // (case.micro_batch_size * dp),
    )


def run_cases(prefix: Path, cases: Sequence[Case]) -> list[Outcome]:
    return [run_case(prefix, case) for case in cases]


def run_case(prefix: Path, case: Case) -> Outcome:
    step = make_step(CONFIG, case.layout, seeded(CONFIG), ADAM)
    own = [batches_of(prefix, number, case, step.topology.dp.rank) for number in range(NUM_STEPS + 1)]
    first, gradients = first_step(step, own[0])
    results = [first, *(step.run(own[number], number, LEARNING_RATE) for number in range(1, NUM_STEPS))]
    total, _ = totals(step.pipeline.evaluate(own[NUM_STEPS]), step.topology)
    pieces = [
        (region, gradient[region.local_slices].clone(), shard.tensor.detach()[region.local_slices].clone())
        for shard, gradient in zip(step.data_parallel.shards, gradients, strict=True)
        for region in shard.regions(step.topology.tp)
    ]
    return Outcome([(r.loss, r.sentence_loss) for r in results], (total.loss, total.sentence_loss), pieces)


def first_step(step: TrainStep, batches: list[Batch]):
    """What `TrainStep.run` does, with a look at the gradients before they are clipped and used."""
    sums = step.pipeline.train(batches, [DropoutStreams(1, 0, batch.index) for batch in batches])
    result, factor = step.finish(sums)
    gradients = [shard.gradient / result.valid_tokens for shard in step.data_parallel.shards]
    step.update(factor, LEARNING_RATE)
    return result, gradients


def serial_losses(stage: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the whole global batch, sample by sample."""
    hidden, sentences = [], []
    for i in range(len(batch.tokens)):
        row = slice(i, i + 1)
        length = int((batch.segment_ids[i] == 0).sum())  # without the padding: nothing depends on it
        types = batch.token_types[row, :length]
        logits = stage(batch.tokens[row, :length], length, token_types=types)
        is_hidden = batch.loss_mask[i, :length] == 1
        hidden.append((logits.tokens[:, 0][is_hidden], batch.labels[i, :length][is_hidden]))
        sentences.append(logits.next_sentence)
    of_tokens = F.cross_entropy(torch.cat([x for x, _ in hidden]), torch.cat([labels for _, labels in hidden]))
    return of_tokens, F.cross_entropy(torch.cat(sentences), batch.is_random)


@pytest.fixture(scope="module")
def serial(sentences: Path) -> tuple[list, tuple, dict[str, Tensor], dict[str, Tensor]]:
    stage = serial_stage(CONFIG, seeded(CONFIG))
    specs, named = shard_specs(stage), dict(stage.named_parameters())
    decayed = [p for p in named.values() if p.dim() > 1]
    others = [p for p in named.values() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(ADAM.adam_beta1, ADAM.adam_beta2),
        eps=ADAM.adam_eps,
    )
    losses, gradients = [], {}
    for number in range(NUM_STEPS):
        of_tokens, of_sentences = serial_losses(stage, batches_of(sentences, number, Case(Layout(), 8), 0)[0])
        (of_tokens + of_sentences).backward()
        losses.append((of_tokens.item(), of_sentences.item()))
        if number == 0:
            gradients = by_name(specs, {name: p.grad for name, p in named.items()})
        assert torch.nn.utils.clip_grad_norm_(list(named.values()), CLIP_GRAD) > CLIP_GRAD, "clipping has to be active"
        optimizer.step()
        optimizer.zero_grad()
    evaluation = serial_losses(stage, batches_of(sentences, NUM_STEPS, Case(Layout(), 8), 0)[0])
    parameters = by_name(specs, {name: p.detach() for name, p in named.items()})
    return losses, tuple(loss.item() for loss in evaluation), gradients, parameters


def by_name(specs, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        region.name: tensors[name][region.local_slices].clone()
        for name, spec in specs.items()
        for region in spec.regions(0, 1)
    }


@pytest.mark.parametrize("world_size", CASES)
def test_losses_gradients_and_parameters_after_three_steps_are_the_serial_ones(sentences, serial, world_size):
    losses, evaluation, gradients, parameters = serial
    ranks = run_distributed(run_cases, world_size, sentences, CASES[world_size])
    for number, case in enumerate(CASES[world_size]):
        covered = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        for outcome in (rank[number] for rank in ranks):
            assert [x for pair in outcome.losses for x in pair] == pytest.approx(
                [x for pair in losses for x in pair], rel=1e-12
            ), case
            assert outcome.evaluation == pytest.approx(evaluation, rel=1e-12), case
            for region, gradient, parameter in outcome.pieces:
                where = region.global_slices
                assert_close(gradient, gradients[region.name], where, f"{case}: gradient {region}")
                assert_close(parameter, parameters[region.name], where, f"{case}: parameter {region}")
                covered[region.name][where] += 1
        assert all((count > 0).all() for count in covered.values())


def assert_close(actual: Tensor, whole: Tensor, where: tuple[slice, ...], what: str) -> None:
    """The bound of the parity law: max |a - b| <= 1e-9 max |a| + 1e-12 over the logical tensor."""
    error, scale = (actual - whole[where]).abs().max(), whole.abs().max()
    assert error <= 1e-9 * scale + 1e-12, f"{what}: off by {error:.2e} where values reach {scale:.2e}"


def test_micro_batches_differ_in_what_they_count(sentences):
    """Else a mean of means would pass as well."""
    batches = batches_of(sentences, 0, Case(Layout(), 1), 0)
    assert len({batch.loss_mask.sum().item() for batch in batches}) > 2
    assert len({len(lengths) for batch in batches for lengths in batch.segment_lengths}) == 2, "some have no padding"
    assert {batch.is_random.item() for batch in batches} == {0, 1}
