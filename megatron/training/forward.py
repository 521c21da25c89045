"""Micro-batches through the pipeline: what one forward action does, and whole training and evaluation passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron.core.collectives import all_reduce
from megatron.core.pipeline.executor import PipelineExecutor
from megatron.core.pipeline.lowering import lower
from megatron.core.pipeline.p2p import Wire
from megatron.core.pipeline.schedules import ScheduleName, build_schedule, forward_only
from megatron.core.pipeline.validation import validate
from megatron.core.random import DropoutStreams
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.topology import Axis, Topology
from megatron.data.loader import Batch
from megatron.model.bert import BertLogits, bert_losses
from megatron.model.config import ModelConfig
from megatron.model.stage import Stage
from megatron.training.build import PipelineParts


@dataclass
class LossSums:
    """Summed over this rank's micro-batches, in float64; zero on ranks that do not hold the last stage.

    `valid_tokens` is the sum of the labels' weights: their number, where all weights are 0 or 1.
    A BERT has two losses, of masked tokens and, one of each sample, of sentences. `num_tokens` are all, padding too.
    """

    loss: Tensor
    valid_tokens: Tensor
    sentence_loss: Tensor
    num_sentences: Tensor
    num_tokens: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> LossSums:
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in fields(cls)))

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, field.name) for field in fields(self))

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class MicrobatchForward:
    """What the executor calls for each forward action: the micro-batches of one step, and their loss sums.

    `sentence_weight` is what one sample's loss of sentences counts, in masked tokens.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        topology: Topology,
        batches: Sequence[Batch],
        streams: Sequence[DropoutStreams] | None,
        sentence_weight: Tensor | float = 0.0,
    ):
        self.stages, self.topology, self.batches, self.streams = stages, topology, batches, streams
        self.sentence_weight = sentence_weight
        self.sums = LossSums.zero(topology.device)

    def __call__(self, number: int, x: Tensor | None, microbatch: int) -> Tensor:
        """The stage's output, or the sum of the losses that count on the last stage."""
        batch, stage = self.batches[microbatch], self.stages[number]
        streams = None if self.streams is None else self.streams[microbatch]
        stage_input = batch.tokens if x is None else x
        output = stage(
            stage_input,
            batch.tokens.shape[1],
            batch.position_ids,
            streams,
            segment_ids=batch.segment_ids,
            segment_lengths=batch.segment_lengths,
            token_types=batch.token_types,
        )
        if stage.is_last:
            self.sums.num_tokens += batch.tokens.numel()
        if isinstance(output, BertLogits):
            return self._pair_loss(output, batch, stage)
        if not stage.is_last:
            return output
        labels, mask = batch.labels.t(), batch.loss_mask.t()
        losses = vocab_parallel_cross_entropy(
            output, labels, self.topology.tp, vocab_size=stage.config.vocab_size, compile=stage.is_compiled
        )
        # A label that does not count may have any loss, so it is left out, not multiplied by zero.
        loss = torch.where(mask > 0, losses * mask, 0.0).sum()
        self.sums.loss += loss.detach()
        self.sums.valid_tokens += mask.sum(dtype=torch.float64)  # weights need not be whole numbers
        return loss

    def _pair_loss(self, logits: BertLogits, batch: Batch, stage: Stage) -> Tensor:
        assert batch.is_random is not None, "a BERT trains on pairs"
        losses = bert_losses(
            logits,
            batch.labels,
            batch.loss_mask,
            batch.is_random,
            self.topology.tp,
            vocab_size=stage.config.vocab_size,
            compile=stage.is_compiled,
        )
        self.sums.loss += losses.tokens.detach()
        self.sums.valid_tokens += batch.loss_mask.sum(dtype=torch.float64)
        self.sums.sentence_loss += losses.sentences.detach()
        self.sums.num_sentences += len(batch.is_random)
        return losses.tokens + self.sentence_weight * losses.sentences


class Pipeline:
    """Runs micro-batches through the stages of all ranks, training or evaluating."""

    def __init__(
        self,
        parts: PipelineParts,
        topology: Topology,
        *,
        schedule: ScheduleName,
        compute_dtype: torch.dtype,
        sequence_parallel: bool,
    ):
        self.parts, self.topology, self.schedule, self.compute_dtype = parts, topology, schedule, compute_dtype
        self.sequence_shards = topology.tp.size if sequence_parallel else 1
        self._executors: dict[tuple[bool, int], PipelineExecutor] = {}

    @property
    def model_config(self) -> ModelConfig:
        return next(iter(self.parts.stages.values())).config

    def train(self, batches: Sequence[Batch], streams: Sequence[DropoutStreams]) -> LossSums:
        """Forward and backward over all micro-batches; the gradients are left to `DataParallel.finish_gradients`."""
        weight = sentence_weight(batches, self.topology.dp) if self.model_config.bert_head else 0.0
        forward = MicrobatchForward(self.parts.stages, self.topology, batches, streams, weight)
        self._executor(len(batches), training=True).run(forward, self._wire(batches), self._before_backward)
        return forward.sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> LossSums:
        """Forward only, without dropout."""
        forward = MicrobatchForward(self.parts.stages, self.topology, batches, streams=None)
        self._executor(len(batches), training=False).run(forward, self._wire(batches))
        return forward.sums

    def _executor(self, num_microbatches: int, *, training: bool) -> PipelineExecutor:
        key = (training, num_microbatches)
        if key not in self._executors:
            placement = self.parts.placement
            if training:
                schedule = build_schedule(
                    self.schedule, placement.num_ranks, num_microbatches, num_chunks=placement.num_chunks
                )
            else:
                schedule = forward_only(placement, num_microbatches)
            validate(schedule)
            self._executors[key] = PipelineExecutor(lower(schedule, self.parts.costs), self.topology.pp.rank)
        return self._executors[key]

    def _wire(self, batches: Sequence[Batch]) -> Wire:
        hidden_size = self.model_config.hidden_size
        sizes = [batch.tokens.shape for batch in batches]
        shapes = [(seq_length // self.sequence_shards, size, hidden_size) for size, seq_length in sizes]
        return Wire(self.topology.pp, shapes, self.compute_dtype, self.topology.device)

    def _before_backward(self, number: int, is_last: bool) -> None:
        chunk = self.parts.placement.stages_of(self.topology.pp.rank).index(number)
        self.parts.data_parallel.prepare_backward(chunk, is_last=is_last)


def sentence_weight(batches: Sequence[Batch], dp: Axis) -> Tensor:
    """The masked tokens of the global batch for each of its samples: a float64 scalar, alike on all ranks.

    BERT's loss is a mean over masked tokens plus a mean over samples. Gradients are divided once, by the masked tokens
    of the global batch, so that a sample's loss has to count this much before: then neither mean depends on how the
    batch is cut. The number is known only once every data rank has drawn its samples.
    """
    masked = torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()
    samples = torch.full_like(masked, sum(len(batch.tokens) for batch in batches))
    masked, samples = all_reduce(torch.stack((masked, samples)), dp)
    return masked / samples
