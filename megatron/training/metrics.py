"""The figures of a logged step and of an evaluation, and how wall times become them."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.config import RunConfig
from megatron.model.flops import flops_per_token
from megatron.training.checkpointing import Progress
from megatron.training.step import StepResult

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class StepMetrics:
    """One logged step. Loss, learning rate, gradient norm and tokens are of this iteration alone.

    The times are means over the steps since the last logged one. `tokens_per_s` is of the whole job, padding and
    masked tokens included; `tflops_per_gpu` counts the model's operations without recomputation, per process.
    `memory_gib` is the peak of the process that reports. `eta_s` is None as long as only one step has run.
    `sentence_loss` is of a BERT, whose `lm_loss` is of masked tokens and which trains on the sum of both; else None.
    """

    iteration: int
    lm_loss: float
    learning_rate: float
    grad_norm: float
    consumed_samples: int
    valid_tokens: int
    step_time_s: float
    tokens_per_s: float
    tflops_per_gpu: float
    memory_gib: float
    eta_s: float | None
    sentence_loss: float | None = None


@dataclass(frozen=True)
class EvaluationMetrics:
    """One evaluation after `iteration` steps: `name` is "validation" or "test", `lm_loss` in nats per valid token.

    `sentence_loss`, of a BERT, is in nats per sample.
    """

    name: str
    iteration: int
    lm_loss: float
    perplexity: float
    valid_tokens: int
    sentence_loss: float | None = None


class StepClock:
    """Turns the times of steps into the figures of a logged step.

    A step's own time excludes evaluations and checkpoints. The ETA includes them, as they have come so far; it
    leaves out the first iteration, which compiles, allocates and connects.
    """

    def __init__(
        self,
        run: RunConfig,
        device: torch.device,
        start_iteration: int,
        *,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._run, self._device, self._start_iteration, self._now = run, device, start_iteration, now
        self._flops_per_token = flops_per_token(run.model, run.data.seq_length)
        self._steps_s = 0.0
        self._num_steps = self._num_tokens = 0
        self._warm_since: float | None = None

    def add(self, step_s: float, num_tokens: int) -> None:
        """Counts one step that took `step_s` seconds for `num_tokens` of the whole job."""
        self._steps_s += step_s
        self._num_tokens += num_tokens
        self._num_steps += 1

    def resume(self) -> None:
        """Call it when all else of an iteration, evaluation and checkpoint, is done."""
        if self._warm_since is None:
            self._warm_since = self._now()

    def metrics(self, progress: Progress, result: StepResult, learning_rate: float) -> StepMetrics:
        """The figures of the step just added; the next interval starts with the next step."""
        step_time_s = self._steps_s / self._num_steps
        tokens_per_s = self._num_tokens / self._steps_s
        self._steps_s, self._num_steps, self._num_tokens = 0.0, 0, 0
        return StepMetrics(
            iteration=progress.iteration,
            lm_loss=result.loss,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            consumed_samples=progress.consumed_samples,
            valid_tokens=result.valid_tokens,
            step_time_s=step_time_s,
            tokens_per_s=tokens_per_s,
            tflops_per_gpu=tokens_per_s * self._flops_per_token / self._run.world_size / 1e12,
            memory_gib=peak_memory_bytes(self._device) / GIB,
            eta_s=self._eta_s(progress.iteration),
            sentence_loss=result.sentence_loss,
        )

    def _eta_s(self, iteration: int) -> float | None:
        remaining = self._run.training.train_iters - iteration
        if self._warm_since is None:
            return None if remaining else 0.0
        num_warm = iteration - self._start_iteration - 1
        return remaining * (self._now() - self._warm_since) / num_warm


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: memory allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # everyone else counts in KiB
