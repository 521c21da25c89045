"""The loss of an instruction batch depends on its conversations: not on packing, padding, micro-batches or ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distributed import run_distributed
from instruct_files import write_conversations
from megatron.data.instruct import Conversations, InstructionDataset, LossWeights, plan_packs
from megatron.data.loader import Padding, StepLoader, batches_for_step
from megatron.optimizer.config import OptimizerConfig
from reference import FAMILIES, seeded, serial_stage, tiny_config
from training_runs import Layout, make_step

SEQ_LENGTH, NUM_EPOCHS, LEARNING_RATE = 40, 2, 1e-3
LENGTHS = [3, 5, 33, 12, 26, 8, 41, 7, 19, 22, 30, 11, 15, 24, 6, 29, 50, 9, 14, 21, 4, 37, 18, 25]
NUM_PACKS = 12
ADAM = OptimizerConfig(lr=LEARNING_RATE, lr_decay_iters=NUM_EPOCHS, clip_grad=0.1)


@dataclass(frozen=True)
class Case:
    """How the epoch's conversations are laid out; what is trained does not depend on it."""

    micro_batch_size: int = 1
    packing: bool = False
    variable: bool = False
    layout: Layout = field(default_factory=Layout)

    def padding(self) -> Padding:
        multiple = 16 * self.layout.tp if self.layout.sequence_parallel else 1
        return Padding(2, SEQ_LENGTH, to_limit=not self.variable, multiple=min(multiple, 8))


def dataset(prefix: Path, weights: LossWeights, *, packing: bool, num_epochs: int) -> InstructionDataset:
    conversations, documents = Conversations(prefix), range(len(LENGTHS))
    packs = plan_packs(conversations, documents, SEQ_LENGTH, None) if packing else None
    per_epoch = len(documents) if packs is None else len(packs)
    return InstructionDataset(
        conversations, documents, num_epochs * per_epoch, SEQ_LENGTH, 5, weights=weights, packs=packs
    )


def run_cases(cases: list[Case], prefix: Path, weights: LossWeights, model: str) -> list[list[tuple[float, float]]]:
    return [run_case(case, prefix, weights, model) for case in cases]


def run_case(case: Case, prefix: Path, weights: LossWeights, model: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; a step is an epoch."""
    config = tiny_config(**FAMILIES[model], num_layers=4, vocab_size=131)
    step = make_step(config, case.layout, seeded(config), ADAM)
    data = dataset(prefix, weights, packing=case.packing, num_epochs=NUM_EPOCHS)
    results = []
    for epoch in range(NUM_EPOCHS):
        batches = batches_for_step(
            data,
            epoch * data.samples_per_epoch,
            micro_batch_size=case.micro_batch_size,
            data_parallel_rank=step.topology.dp.rank,
            data_parallel_size=case.layout.dp,
            num_microbatches=data.samples_per_epoch // (case.micro_batch_size * case.layout.dp),
            padding=case.padding(),
        )
        result = step.run(batches, epoch, LEARNING_RATE)
        own = sum(batch.tokens.numel() for batch in batches)
        assert result.num_tokens == own if case.layout.dp == 1 else result.num_tokens > own
        results.append((result.loss, result.grad_norm))
    return results


def by_hand(prefix: Path, weights: LossWeights, model: str) -> float:
    """The first epoch's loss, each conversation alone and without padding."""
    config = tiny_config(**FAMILIES[model], num_layers=4, vocab_size=131)
    stage, data = serial_stage(config, seeded(config)), dataset(prefix, weights, packing=False, num_epochs=1)
    total = count = 0.0
    for sample in map(data.__getitem__, range(len(data))):
        tokens, mask = torch.from_numpy(sample.tokens), torch.from_numpy(sample.loss_mask).double()
        losses = F.cross_entropy(stage(tokens[None, :-1], len(mask))[:, 0], tokens[1:], reduction="none")
        total, count = total + (losses * mask).sum().item(), count + mask.sum().item()
    return total / count


SERIAL = [
    Case(),
    Case(3),
    Case(8, variable=True),
    Case(1, variable=True),
    Case(packing=True),
    Case(4, packing=True, variable=True),
]
SPREAD = {
    2: [Case(2, layout=Layout(dp=2)), Case(3, packing=True, variable=True, layout=Layout(dp=2, zero_stage=2))],
    4: [
        Case(2, packing=True, layout=Layout(tp=2, pp=2, sequence_parallel=True, recompute="selective")),
        Case(2, variable=True, layout=Layout(tp=2, pp=2, sequence_parallel=True, recompute="uniform")),
        Case(1, variable=True, layout=Layout(pp=2, dp=2, schedule="interleaved")),
        Case(1, packing=True, variable=True, layout=Layout(pp=4)),
    ],
}


@pytest.mark.parametrize("model", ["llama", "mistral", "gpt2"])
def test_packing_padding_and_micro_batches_do_not_change_the_loss(tmp_path: Path, model: str):
    weights = LossWeights("assistant", 0.3)
    prefix = write_conversations(tmp_path / "chat", LENGTHS, vocab_size=131)
    (runs,) = run_distributed(run_cases, 1, SERIAL, prefix, weights, model)
    assert runs[0][0][0] == pytest.approx(by_hand(prefix, weights, model), rel=1e-12)
    for case, results in zip(SERIAL, runs, strict=True):
        for ours, expected in zip(results, runs[0], strict=True):
            assert ours == pytest.approx(expected, rel=1e-12), case


@pytest.mark.parametrize("world_size", SPREAD)
def test_ranks_do_not_change_the_loss_either(tmp_path: Path, world_size: int):
    weights = LossWeights()
    prefix = write_conversations(tmp_path / "chat", LENGTHS, vocab_size=131)
    (serial,) = run_distributed(run_cases, 1, SERIAL[:1], prefix, weights, "llama")
    for runs in run_distributed(run_cases, world_size, SPREAD[world_size], prefix, weights, "llama"):
        for case, results in zip(SPREAD[world_size], runs, strict=True):
            for ours, expected in zip(results, serial[0], strict=True):
                assert ours == pytest.approx(expected, rel=1e-12), case


@pytest.mark.parametrize("model", ["llama", "mistral", "gpt2", "falcon 7"])
def test_a_packed_conversation_has_the_logits_that_it_has_alone(tmp_path: Path, model: str):
    config = tiny_config(**FAMILIES[model], num_layers=2, vocab_size=131)
    stage = serial_stage(config, seeded(config))
    prefix = write_conversations(tmp_path / "chat", LENGTHS, vocab_size=131)
    data = dataset(prefix, LossWeights(), packing=True, num_epochs=1)
    assert len(data) == NUM_PACKS
    batch = batches_for_step(
        data,
        0,
        micro_batch_size=NUM_PACKS,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_microbatches=1,
        padding=Padding(0, SEQ_LENGTH),
    )[0]
    ids, lengths = batch.segment_ids, batch.segment_lengths
    assert ids is not None and lengths is not None
    packed = stage(batch.tokens, SEQ_LENGTH, batch.position_ids, segment_ids=ids, segment_lengths=lengths)
    masked = stage(batch.tokens, SEQ_LENGTH, batch.position_ids, segment_ids=ids)
    assert torch.allclose(packed, masked, rtol=0, atol=1e-12 * packed.abs().max().item())
    for row, row_lengths in enumerate(lengths):
        for start, length in zip(np.cumsum([0, *row_lengths]), row_lengths, strict=False):
            own = stage(batch.tokens[row : row + 1, start : start + length], length)[:, 0]
            ours = packed[start : start + length, row]
            assert (own - ours).abs().max() <= 1e-12 * own.abs().max()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_restart_under_another_data_parallel_size_goes_on_with_the_same_samples(
    tmp_path: Path, packing: bool, stop: int
):
    """Row by row the stream is that of the run that was never stopped, which has one rank and no worker."""
    prefix = write_conversations(tmp_path / "chat", LENGTHS, vocab_size=131)
    data = dataset(prefix, LossWeights(), packing=packing, num_epochs=4)
    global_batch, num_steps = 4, 8

    def rows(first: int, num: int, dp: int, micro: int, workers: int) -> list[list[tuple[int, ...]]]:
        loaders = [
            StepLoader(
                data,
                first * global_batch,
                micro_batch_size=micro,
                data_parallel_rank=rank,
                data_parallel_size=dp,
                num_microbatches=global_batch // (micro * dp),
                num_workers=workers,
                padding=Padding(2, SEQ_LENGTH),
            )
            for rank in range(dp)
        ]
        steps = []
        for _ in range(num):
            batches = sorted((batch for loader in loaders for batch in next(loader)), key=lambda batch: batch.index)
            steps.append(
                [tuple(row.tolist()) for batch in batches for row in torch.cat([batch.tokens, batch.labels], 1)]
            )
        for loader in loaders:
            loader.close()
        return steps

    whole = rows(0, num_steps, 1, 1, 0)
    assert len({row for step in whole for row in step}) > global_batch
    for dp, micro, workers in [(2, 2, 3), (4, 1, 1), (1, 4, 2)]:
        assert rows(0, stop, 1, 2, 1) + rows(stop, num_steps - stop, dp, micro, workers) == whole
