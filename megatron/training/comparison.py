"""Our logits against those of another program, batch by batch, wherever on the layout they are computed.

Legend: s sequence, b micro-batch, v vocabulary, tp tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.collectives import all_reduce, gather_last_dim
from megatron.core.pipeline.executor import PipelineExecutor
from megatron.core.pipeline.lowering import lower
from megatron.core.pipeline.p2p import Wire
from megatron.core.pipeline.schedules import forward_only
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.topology import Topology
from megatron.data.loader import Batch
from megatron.model.bert import BertLogits
from megatron.model.stage import Stage
from megatron.training.build import PipelineParts

Reference: TypeAlias = Callable[[Tensor], Tensor | BertLogits]
"""tokens [b, s] -> logits [b, s, v], for BERT with those of the sentences, on any device and of any type."""


@dataclass(frozen=True)
class Comparison:
    """Absolute errors of the logits, losses in nats per token, and the share of positions with one greedy token.

    `max_error` is over the sentences' logits too, where there are any; all else is of tokens.
    """

    max_error: float
    mean_error: float
    loss: float
    reference_loss: float
    same_token: float

    @property
    def loss_error(self) -> float:
        return abs(self.loss - self.reference_loss)


def holds_logits(topology: Topology) -> bool:
    """Whether this rank compares: one of those that have the last stage, for each data-parallel rank."""
    return topology.pp.is_last and topology.tp.is_first


@torch.no_grad()
def compare_logits(
    parts: PipelineParts,
    topology: Topology,
    batches: Sequence[Batch],
    reference: Reference | None,
    *,
    hidden_dtype: torch.dtype,
    sequence_parallel: bool,
) -> list[Comparison]:
    """One comparison for each of the global batches' micro-batches, alike on all ranks. Every rank calls it together.

    `batches` are this data rank's, of equal size; `reference` is needed where `holds_logits`.
    """
    executor = PipelineExecutor(lower(forward_only(parts.placement, len(batches))), topology.pp.rank)
    forward = _ComparingForward(parts.stages, topology, batches, reference if holds_logits(topology) else None)
    micro_batch_size, seq_length = batches[0].tokens.shape
    shards = topology.tp.size if sequence_parallel else 1
    hidden_size = next(iter(parts.stages.values())).config.hidden_size
    shape = (seq_length // shards, micro_batch_size, hidden_size)
    wire = Wire(topology.pp, [shape] * len(batches), hidden_dtype, topology.device)
    executor.run(forward, wire, before_backward=lambda stage, is_last: None)

    num_batches = len(batches) * topology.dp.size
    table = torch.zeros(num_batches, len(fields(Comparison)), dtype=torch.float64, device=topology.device)
    for index, comparison in forward.comparisons.items():
        table[index] = torch.tensor(astuple(comparison), dtype=torch.float64)
    return [Comparison(*row) for row in all_reduce(table, topology.world).tolist()]  # each row is zero but on one rank


def overall(comparisons: Sequence[Comparison]) -> Comparison:
    """The largest error, and the mean of everything else."""
    means = torch.tensor([astuple(comparison) for comparison in comparisons], dtype=torch.float64).mean(0).tolist()
    # torch's max keeps a NaN; Python's may lose it.
    worst = torch.tensor([comparison.max_error for comparison in comparisons], dtype=torch.float64).max().item()
    return Comparison(worst, *means[1:])


class _ComparingForward:
    """What the executor calls for each forward action."""

    def __init__(
        self, stages: Mapping[int, Stage], topology: Topology, batches: Sequence[Batch], reference: Reference | None
    ):
        self.stages, self.topology, self.batches, self.reference = stages, topology, batches, reference
        self.comparisons: dict[int, Comparison] = {}

    def __call__(self, number: int, x: Tensor | None, microbatch: int) -> Tensor:
        batch, stage = self.batches[microbatch], self.stages[number]
        output = stage(batch.tokens if x is None else x, batch.tokens.shape[1], batch.position_ids)
        if stage.is_last:
            self._compare(output, batch, stage.config.vocab_size)
        return output

    def _compare(self, output: Tensor | BertLogits, batch: Batch, vocab_size: int) -> None:
        """Logits of tokens: [s, b, v/tp], consumed."""
        tp, labels, mask = self.topology.tp, batch.labels.t(), batch.loss_mask.t()
        of_tokens, of_sentences = output if isinstance(output, BertLogits) else (output, None)
        logits = gather_last_dim(of_tokens, tp)[..., :vocab_size].float().clone()
        losses = vocab_parallel_cross_entropy(of_tokens, labels, tp, vocab_size=vocab_size)
        if self.reference is None:
            return
        theirs = self.reference(batch.tokens)
        expected, for_sentences = theirs if isinstance(theirs, BertLogits) else (theirs, None)
        expected = expected.to(logits).transpose(0, 1)
        errors = (logits - expected).abs()
        largest = errors.max()
        if of_sentences is not None and for_sentences is not None:
            largest = torch.maximum(largest, (of_sentences.float() - for_sentences.to(logits)).abs().max())
        expected_losses = F.cross_entropy(expected.movedim(-1, 1), labels, reduction="none")
        self.comparisons[batch.index] = Comparison(
            max_error=largest.item(),
            mean_error=errors.mean(dtype=torch.float64).item(),
            loss=_masked_mean(losses, mask),
            reference_loss=_masked_mean(expected_losses, mask),
            same_token=(logits.argmax(-1) == expected.argmax(-1)).double().mean().item(),
        )


def _masked_mean(losses: Tensor, mask: Tensor) -> float:
    return ((losses * mask).sum() / mask.sum()).item()
