"""The loop: steps, log lines, evaluations, checkpoints, and reasons to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.config import RunConfig
from megatron.core.topology import Topology
from megatron.data.loader import StepLoader, batches_for_step
from megatron.data.sample import SampleSource
from megatron.errors import CheckpointError
from megatron.optimizer.schedule import learning_rate
from megatron.training.checkpointing import Progress, RunCheckpoints
from megatron.training.datasets import NamedData, RunDatasets
from megatron.training.forward import LossSums
from megatron.training.metrics import EvaluationMetrics, StepClock
from megatron.training.saving import Saver
from megatron.training.signals import StopRequest, stop_on_sigterm
from megatron.training.sinks import MetricsLog
from megatron.training.step import TrainStep, totals


class Trainer:
    """Trains from where `progress` stands to the end of the run, or to a reason to leave before.

    Without a `saver` nothing is kept.
    """

    def __init__(
        self,
        run: RunConfig,
        topology: Topology,
        step: TrainStep,
        datasets: RunDatasets,
        checkpoints: RunCheckpoints,
        saver: Saver | None,
        log: MetricsLog,
    ):
        self.run, self.topology, self.step = run, topology, step
        self.datasets, self.checkpoints, self.log = datasets, checkpoints, log
        self._saver = saver
        self._batching = {
            "micro_batch_size": run.training.micro_batch_size,
            "data_parallel_rank": topology.dp.rank,
            "data_parallel_size": topology.dp.size,
            "num_microbatches": run.num_microbatches,
        }
        self._padding = datasets.padding

    def fit(self, progress: Progress) -> Progress:
        """Runs the loop and returns where it ended. Every rank calls it together."""
        clock = StepClock(self.run, self.topology.device, progress.iteration)
        # What was loaded from elsewhere is not saved yet, even if there is nothing to train.
        saved = progress if self.run.checkpoint.load == self.run.checkpoint.save else None
        loader = StepLoader(
            self.datasets.train,
            progress.consumed_samples,
            num_workers=self.run.data.num_workers,
            padding=self._padding,
            **self._batching,
        )
        with stop_on_sigterm(self.topology, self._has_save_failed) as stop, loader, self._save_in_flight():
            while progress.iteration < self.run.training.train_iters:
                progress = self._step(loader, clock, progress)
                if not stop.agree():
                    self._evaluate_when_due(progress, stop)
                self._look_after_save(stop)
                reason = self._reason_to_leave(progress, stop)
                if self._is_save_due(progress) or reason:
                    saved = self._save(progress)
                clock.resume()
                if reason:
                    self.log.message(f"{reason} at iteration {progress.iteration}: leaving")
                    return progress
            if saved != progress:
                self._save(progress)
            self._evaluate_at_end(progress, stop)
        return progress

    def evaluate(self, dataset: SampleSource, name: str, iteration: int, stop: StopRequest) -> None:
        """Logs the mean loss over the first `eval_iters` global batches of `dataset`, without dropout, as `name`.

        Given up, and not logged, when the run is asked to stop meanwhile.
        """
        sums = LossSums.zero(self.topology.device)
        for number in range(self.run.training.eval_iters):
            if stop.agree():
                return
            start = number * self.run.training.global_batch_size
            batches = batches_for_step(dataset, start, padding=self._padding, **self._batching)
            sums += self.step.pipeline.evaluate([batch.to(self.topology.device) for batch in batches])
        self.step.data_parallel.refresh()  # ZeRO: the weights gathered for evaluating need not stay
        total, _ = totals(sums, self.topology)
        perplexity = math.exp(min(total.loss, 700.0))
        self.log.evaluation(
            EvaluationMetrics(name, iteration, total.loss, perplexity, round(total.weight), total.sentence_loss)
        )

    def _step(self, loader: StepLoader, clock: StepClock, progress: Progress) -> Progress:
        iteration = progress.iteration + 1
        rate = learning_rate(self.run.optimizer, iteration)
        started = time.perf_counter()
        batches = [batch.to(self.topology.device) for batch in next(loader)]
        result = self.step.run(batches, iteration, rate)
        clock.add(time.perf_counter() - started, result.num_tokens)
        progress = Progress(iteration, loader.consumed_samples)
        if iteration % self.run.logging.log_interval == 0:
            self.log.step(clock.metrics(progress, result, rate))
        return progress

    def _evaluate_when_due(self, progress: Progress, stop: StopRequest) -> None:
        due = progress.iteration % self.run.training.eval_interval == 0
        if due:
            self._evaluate_all(self.datasets.validation, progress, stop)

    def _evaluate_at_end(self, progress: Progress, stop: StopRequest) -> None:
        if progress.iteration % self.run.training.eval_interval:
            self._evaluate_all(self.datasets.validation, progress, stop)
        self._evaluate_all(self.datasets.test, progress, stop)

    def _evaluate_all(self, datasets: NamedData, progress: Progress, stop: StopRequest) -> None:
        for name, dataset in datasets.items():
            self.evaluate(dataset, name, progress.iteration, stop)

    def _is_save_due(self, progress: Progress) -> bool:
        interval = self.run.checkpoint.save_interval
        return interval is not None and progress.iteration % interval == 0

    def _reason_to_leave(self, progress: Progress, stop: StopRequest) -> str | None:
        if stop.is_agreed:
            return "SIGTERM"
        interval = self.run.training.exit_interval
        if (
            interval is not None
            and progress.iteration % interval == 0
            and progress.iteration < self.run.training.train_iters
        ):
            return f"--exit_interval {interval}"
        return None

    def _save(self, progress: Progress) -> Progress:
        if self._saver is not None:
            self._tell(self._saver.finish())
            self._tell(self._saver.save(*self.checkpoints.state(progress)))
        return progress

    def _has_save_failed(self) -> bool:
        return self._saver is not None and self._saver.has_failed

    def _look_after_save(self, stop: StopRequest) -> None:
        """Raises CheckpointError on every rank alike once the save in flight has failed on any."""
        if self._saver is None:
            return
        if stop.save_failed:
            self._saver.finish()
            raise CheckpointError("a save in the background failed on another rank; see its message.")
        self._tell(self._saver.finished())

    @contextmanager
    def _save_in_flight(self) -> Iterator[None]:
        """Leaves with no save in flight: however a run ends, the checkpoint that it has begun is completed."""
        try:
            yield
        except BaseException:
            if self._saver is not None:
                self._saver.abandon()
            raise
        if self._saver is not None:
            self._tell(self._saver.finish())

    def _tell(self, message: str | None) -> None:
        if message is not None:
            self.log.message(message)
