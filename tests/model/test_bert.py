"""BERT is what `transformers` computes, on every layout: both heads, padding, token types, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distributed import run_distributed
from families import logical_shape, transformers_model
from megatron.core.data_parallel import DataParallelConfig
from megatron.core.layout import ParallelLayout
from megatron.core.pipeline.executor import PipelineExecutor
from megatron.core.pipeline.lowering import lower
from megatron.core.pipeline.p2p import Wire
from megatron.core.pipeline.schedules import build_schedule
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Axis, Topology
from megatron.model.bert import BertLogits, bert_losses
from megatron.model.config import ModelConfig
from megatron.model.stage import Stage, StageOptions
from megatron.training.build import PipelineParts, build_parts, fill_weights
from megatron.training.gradients import sum_shared_gradients
from reference import BERT, seeded, serial_stage, tiny_config
from training_runs import RECOMPUTE, Layout

S = 24
LENGTHS = ((24, 17), (9, 20))  # of the two samples of each micro-batch, before padding


@dataclass(frozen=True)
class BertBatch:
    tokens: Tensor
    token_types: Tensor
    segment_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    is_random: Tensor


def batches(config: ModelConfig) -> list[BertBatch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for lengths in LENGTHS:
        position, length = torch.arange(S), torch.tensor(lengths).unsqueeze(1)
        is_real = position < length
        made.append(
            BertBatch(
                tokens=torch.randint(config.vocab_size, (2, S), generator=generator),
                token_types=((position >= length // 3) & is_real).long(),
                segment_ids=is_real.long(),
                labels=torch.randint(config.vocab_size, (2, S), generator=generator),
                loss_mask=((torch.rand(2, S, generator=generator) < 0.3) & is_real).float(),
                is_random=torch.randint(2, (2,), generator=generator),
            )
        )
    return made


def num_masked(made: Sequence[BertBatch]) -> float:
    return sum(batch.loss_mask.sum().item() for batch in made)


def loss_of(logits: BertLogits, batch: BertBatch, axis: Axis, config: ModelConfig, made: Sequence[BertBatch]) -> Tensor:
    losses = bert_losses(logits, batch.labels, batch.loss_mask, batch.is_random, axis, vocab_size=config.vocab_size)
    return losses.tokens + num_masked(made) / sum(len(batch.tokens) for batch in made) * losses.sentences


def run_stage(stage: Stage, x: Tensor, batch: BertBatch) -> Tensor | BertLogits:
    return stage(x, S, segment_ids=batch.segment_ids, token_types=batch.token_types)


VARIANTS = {"tied": {}, "untied": {"tie_embed_logits": False}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_equal_transformers_in_float64(variant):
    """Its loss is a mean over masked tokens and a mean over sentences; ours are sums over micro-batches."""
    config = tiny_config(**{**BERT, **VARIANTS[variant]})
    read, made = seeded(config), batches(tiny_config(**BERT))
    ours, theirs = serial_stage(config, read), transformers_model("bert", config, read)
    total = torch.zeros((), dtype=torch.float64)
    for batch in made:
        logits = run_stage(ours, batch.tokens, batch)
        expected = theirs.module(batch.tokens, batch.segment_ids, batch.token_types)
        is_real = batch.segment_ids == 1
        ours_real, theirs_real = logits.tokens.transpose(0, 1)[is_real], expected.prediction_logits[is_real]
        assert (ours_real - theirs_real).abs().max() <= 1e-10 * theirs_real.abs().max()
        torch.testing.assert_close(logits.next_sentence, expected.seq_relationship_logits, rtol=1e-10, atol=1e-12)
        total = total + loss_of(logits, batch, Axis("tp"), config, made)
    loss = total / num_masked(made)
    loss.backward()

    whole = BertBatch(*(torch.cat([getattr(batch, name) for batch in made]) for name in BertBatch.__annotations__))
    labels = whole.labels.masked_fill(whole.loss_mask == 0, -100)
    expected_loss = theirs.module(
        whole.tokens,
        whole.segment_ids,
        whole.token_types,
        labels=labels,
        next_sentence_label=whole.is_random,
    ).loss
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    gradients = theirs.gradients()
    for name, spec in shard_specs(ours).items():
        for region in spec.regions(0, 1):
            view = gradients.pop(region.name)
            expected_gradient = view.reshape(logical_shape(config, region.name, view))
            # All keys shifted alike: zero but for rounding.
            scale = 1.0 if region.name.endswith("attention.k.bias") else expected_gradient.abs().max()
            error = (ours.get_parameter(name).grad[region.local_slices] - expected_gradient).abs().max()
            assert error <= 1e-10 * scale, region.name
    assert not gradients


LAYOUTS = {
    2: [
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=True, recompute="selective"),
        Layout(pp=2),
        Layout(zero_stage=3, dp=2),
    ],
    4: [Layout(tp=2, pp=2, sequence_parallel=True, recompute="uniform"), Layout(tp=4)],
}


def train_on(layouts: Sequence[Layout]) -> list[tuple[float, list]]:
    return [gradients_on(layout) for layout in layouts]


def gradients_on(layout: Layout) -> tuple[float, list]:
    """This rank's sum of losses, and its regions with their gradients."""
    config = tiny_config(**BERT)
    topology = Topology.create(ParallelLayout(pp=layout.pp, dp=layout.dp, tp=layout.tp))
    options = StageOptions(
        padded_vocab_size=1040, sequence_parallel=layout.sequence_parallel, recompute=RECOMPUTE[layout.recompute]
    )
    engine = DataParallelConfig(zero_stage=layout.zero_stage, compute_dtype=torch.float64)
    parts = build_parts(config, topology, options, engine, master_dtype=torch.float64)
    fill_weights(parts.data_parallel, topology, seeded(config))
    loss = run_pipeline(parts, topology, config, layout.tp if layout.sequence_parallel else 1)
    parts.data_parallel.finish_gradients()
    sum_shared_gradients(parts.data_parallel.shards, topology)
    return loss, [
        (region, shard.gradient[region.local_slices].clone())
        for shard in parts.data_parallel.shards
        for region in shard.regions(topology.tp)
    ]


def run_pipeline(parts: PipelineParts, topology: Topology, config: ModelConfig, sequence_shards: int) -> float:
    made = batches(config)
    own = made[topology.dp.rank :: topology.dp.size]
    losses = []

    def forward(number: int, x: Tensor | None, microbatch: int) -> Tensor:
        batch, stage = own[microbatch], parts.stages[number]
        output = run_stage(stage, batch.tokens if x is None else x, batch)
        if not stage.is_last:
            return output
        loss = loss_of(output, batch, topology.tp, config, made)
        losses.append(loss.item())
        return loss

    def before_backward(number: int, is_last: bool) -> None:
        parts.data_parallel.prepare_backward(0, is_last=is_last)

    program = lower(build_schedule("1f1b", topology.pp.size, len(own)), parts.costs)
    shapes = [(S // sequence_shards, 2, config.hidden_size)] * len(own)
    wire = Wire(topology.pp, shapes, torch.float64, topology.device)
    PipelineExecutor(program, topology.pp.rank).run(forward, wire, before_backward)
    return sum(losses)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_every_layout_has_the_serial_loss_and_gradients(world_size):
    config = tiny_config(**BERT)
    stage, made = serial_stage(config, seeded(config)), batches(config)
    total = sum(loss_of(run_stage(stage, batch.tokens, batch), batch, Axis("tp"), config, made) for batch in made)
    total.backward()
    expected = {
        region.name: stage.get_parameter(name).grad[region.local_slices]
        for name, spec in shard_specs(stage).items()
        for region in spec.regions(0, 1)
    }
    ranks = run_distributed(train_on, world_size, LAYOUTS[world_size])
    for number, layout in enumerate(LAYOUTS[world_size]):
        covered = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
        losses = [loss for loss, _ in (rank[number] for rank in ranks)]
        assert sum(losses) / layout.tp == pytest.approx(total.item(), rel=1e-12)
        for _, pieces in (rank[number] for rank in ranks):
            for region, gradient in pieces:
                whole = expected[region.name]
                error = (gradient - whole[region.global_slices]).abs().max()
                assert error <= 1e-9 * whole.abs().max() + 1e-12, (layout, region)
                covered[region.name][region.global_slices] += 1
        assert all((count > 0).all() for count in covered.values())
