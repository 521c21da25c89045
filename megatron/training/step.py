"""One optimizer step: micro-batches, gradients finished in one fixed order, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.collectives import all_reduce
from megatron.core.random import DropoutStreams
from megatron.core.topology import Topology
from megatron.data.loader import Batch
from megatron.errors import TrainingError
from megatron.optimizer.grad_norm import GradientNorm, clip_factor, scale_gradients
from megatron.optimizer.optimizers import Optimizer
from megatron.training.forward import LossSums, Pipeline
from megatron.training.gradients import sum_shared_gradients


@dataclass(frozen=True)
class StepResult:
    """Alike on all ranks. `loss` is in nats per valid token, `grad_norm` is the norm before clipping.

    `valid_tokens` is the sum of the labels' weights, rounded; `num_tokens` are all, padding too. `sentence_loss` is a
    BERT's, in nats per sample: it trains on the sum of both losses, each a mean over the whole global batch.
    """

    loss: float
    grad_norm: float
    valid_tokens: int
    num_tokens: int
    sentence_loss: float | None = None


class TrainStep:
    """Runs steps. The loss is divided by the number of valid tokens in the whole global batch, and by nothing else."""

    def __init__(self, pipeline: Pipeline, optimizer: Optimizer, topology: Topology, *, clip_grad: float, seed: int):
        self.pipeline, self.optimizer, self.topology = pipeline, optimizer, topology
        self.clip_grad, self.seed = clip_grad, seed
        self.data_parallel = pipeline.parts.data_parallel
        self.gradient_norm = GradientNorm(self.data_parallel.shards, topology)

    def run(self, batches: Sequence[Batch], iteration: int, lr: float) -> StepResult:
        """Trains on this rank's micro-batches of one global batch.

        Raises TrainingError on all ranks, before anything is updated, if the loss or the norm is not finite.
        """
        streams = [DropoutStreams(self.seed, iteration, batch.index) for batch in batches]
        sums = self.pipeline.train(batches, streams)
        result, factor = self.finish(sums)
        self._check_finite(result, iteration)
        self.update(factor, lr)
        return result

    def finish(self, sums: LossSums) -> tuple[StepResult, float]:
        """Completes the gradients of the summed loss in every shard; returns what to multiply them with as well.

        The factor makes them the gradient of the mean loss, clipped.
        """
        self.data_parallel.finish_gradients()
        sum_shared_gradients(self.data_parallel.shards, self.topology)
        total, (square,) = totals(sums, self.topology, self.gradient_norm.local_square())
        scale = 1.0 / (total.weight or 1.0)
        norm = math.sqrt(square) * scale
        result = StepResult(total.loss, norm, round(total.weight), total.num_tokens, total.sentence_loss)
        return result, clip_factor(norm, self.clip_grad) * scale

    def update(self, factor: float, lr: float) -> None:
        """Updates the weights with the finished gradients times `factor`, and clears them."""
        scale_gradients(self.data_parallel.shards, factor)
        self.optimizer.step(lr)
        self.data_parallel.refresh()
        self.data_parallel.zero_gradients()

    def _check_finite(self, result: StepResult, iteration: int) -> None:
        losses = result.loss + (result.sentence_loss or 0.0)
        if not (abs(losses) < float("inf") and result.grad_norm < float("inf")):
            raise TrainingError(
                f"iteration {iteration}: loss {losses}, gradient norm {result.grad_norm}: not finite, so nothing "
                "was updated; resume from the last checkpoint with a lower --lr or another --seed, or look at the data."
            )


@dataclass(frozen=True)
class Totals:
    """Over all ranks: the loss per valid token (0.0 if there is none), the weight of valid tokens, the number of all,
    and for a BERT the loss per sample of its sentences."""

    loss: float
    weight: float
    num_tokens: int
    sentence_loss: float | None


def totals(sums: LossSums, topology: Topology, *others: Tensor) -> tuple[Totals, list[float]]:
    """The means of a global batch, and the sums of `others`.

    One small collective and one wait for the device, whatever is summed.
    """
    is_counted = topology.tp.is_first  # tensor ranks compute the same losses
    own = torch.stack((*(value * is_counted for value in sums), *others))
    loss, weight, sentence_loss, num_sentences, num_tokens, *rest = all_reduce(own, topology.world).tolist()
    sentence_mean = sentence_loss / num_sentences if num_sentences else None
    return Totals(loss / (weight or 1.0), weight, int(num_tokens), sentence_mean), rest
