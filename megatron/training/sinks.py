"""Where the figures of a run go: a line on the console, a line in metrics.jsonl, and TensorBoard.

metrics.jsonl lies in the --save folder and has one JSON object a line, each with the key ``iteration``:

    a logged step   the fields of `StepMetrics` under their names: lm_loss, learning_rate, grad_norm, ...
    an evaluation   validation_loss, validation_perplexity, validation_tokens; or test_loss, ...

A BERT has sentence_loss as well, and validation_sentence_loss.
Numbers have all their digits; what is not finite is null. A resumed run appends. Nothing is ever taken back,
so a run that was killed after its last checkpoint leaves lines of iterations that its successor repeats:
`read_metrics` returns the history that the last run continued.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from megatron.config import RunConfig
from megatron.errors import ConfigError, TrainingError
from megatron.training.metrics import EvaluationMetrics, StepMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"

Line = dict[str, float | int | None]


class MetricsLog:
    """Hands every figure to all sinks of this process: those that `run` asks for on the main one, none elsewhere.

    `resumed_at` is the iteration of the checkpoint that the run continues, None for a new run.
    """

    def __init__(self, run: RunConfig, *, device: torch.device, is_main: bool, resumed_at: int | None = None):
        self._sinks: list[Sink] = []
        if not is_main:
            return
        self._sinks.append(ConsoleSink(run.training.train_iters, run.world_size, is_gpu=device.type == "cuda"))
        if run.checkpoint.save is not None:
            self._sinks.append(JsonLinesSink(Path(run.checkpoint.save) / METRICS_FILE))
        if run.logging.tensorboard_dir is not None:
            self._sinks.append(TensorBoardSink(run.logging.tensorboard_dir, first_iteration=(resumed_at or 0) + 1))

    def step(self, metrics: StepMetrics) -> None:
        for sink in self._sinks:
            sink.step(metrics)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        for sink in self._sinks:
            sink.evaluation(metrics)

    def message(self, text: str) -> None:
        """A note for whoever watches the console."""
        for sink in self._sinks:
            sink.message(text)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class Sink(Protocol):
    """One place that figures go to."""

    def step(self, metrics: StepMetrics) -> None: ...
    def evaluation(self, metrics: EvaluationMetrics) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


class ConsoleSink:
    """One line a figure, in fixed columns, each with its time of day, flushed at once.

    Speeds are per GPU. On the CPU, whose cores the processes share, they are of the whole job.
    """

    def __init__(
        self,
        train_iters: int,
        world_size: int,
        *,
        is_gpu: bool,
        time_of_day: Callable[[], str] = lambda: time.strftime("%H:%M:%S"),
    ):
        self._train_iters, self._world_size, self._is_gpu = train_iters, world_size, is_gpu
        self._time_of_day = time_of_day

    def step(self, metrics: StepMetrics) -> None:
        columns = [
            f"lm loss {metrics.lm_loss:9.6f}",
            *_sentence_column(metrics.sentence_loss),
            f"lr {metrics.learning_rate:.3e}",
            f"grad norm {metrics.grad_norm:9.4g}",
            f"{_four_digits(metrics.step_time_s)} s/step",
            *self._speed(metrics),
            f"{metrics.memory_gib:6.2f} GiB",
            f"ETA {_duration(metrics.eta_s)}",
        ]
        self._print(self._title("iteration", metrics.iteration), *columns)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        self._print(
            self._title(metrics.name, metrics.iteration),
            f"lm loss {metrics.lm_loss:9.6f}",
            *_sentence_column(metrics.sentence_loss),
            f"perplexity {metrics.perplexity:.6g}",
            f"{metrics.valid_tokens} tokens",
        )

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass

    def _title(self, name: str, iteration: int) -> str:
        return f"{name:10} {iteration:{len(str(self._train_iters))}d}/{self._train_iters}"

    def _speed(self, metrics: StepMetrics) -> tuple[str, str]:
        if self._is_gpu:
            ktok_per_gpu = metrics.tokens_per_s / self._world_size / 1e3
            return f"{_four_digits(ktok_per_gpu)} ktok/s/gpu", f"{_four_digits(metrics.tflops_per_gpu)} TFLOP/s/gpu"
        gflops = metrics.tflops_per_gpu * self._world_size * 1e3
        return f"{metrics.tokens_per_s:7.0f} tok/s", f"{_four_digits(gflops)} GFLOP/s"

    def _print(self, *columns: str) -> None:
        print(" | ".join((self._time_of_day(), *columns)), flush=True)


class JsonLinesSink:
    """Appends to metrics.jsonl. Each line is written and flushed whole; one that a crash cut off is removed first."""

    def __init__(self, path: Path):
        self._path = path
        try:
            _remove_unfinished_line(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); choose another folder for --save.", this_rank_only=True
            ) from error

    def step(self, metrics: StepMetrics) -> None:
        self._write(_without_absent(asdict(metrics), "sentence_loss"))

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        sentence_loss = f"{metrics.name}_sentence_loss"
        line: Line = {
            "iteration": metrics.iteration,
            f"{metrics.name}_loss": metrics.lm_loss,
            f"{metrics.name}_perplexity": metrics.perplexity,
            f"{metrics.name}_tokens": metrics.valid_tokens,
            sentence_loss: metrics.sentence_loss,
        }
        self._write(_without_absent(line, sentence_loss))

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()

    def _write(self, line: Line) -> None:
        try:
            self._file.write(to_json(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"{self._path} cannot be written ({error.strerror}); free some space and resume from the last "
                "checkpoint.",
                this_rank_only=True,
            ) from error


class TensorBoardSink:
    """Scalars under train/, validation/ and test/. What a killed run logged from `first_iteration` on is hidden."""

    def __init__(self, folder: str, *, first_iteration: int):
        self._writer = _summary_writer(folder, first_iteration)

    def step(self, metrics: StepMetrics) -> None:
        for name, value in asdict(metrics).items():
            if name != "iteration" and value is not None:
                self._writer.add_scalar(f"train/{name}", value, metrics.iteration)
        self._writer.flush()

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        self._writer.add_scalar(f"{metrics.name}/lm_loss", metrics.lm_loss, metrics.iteration)
        self._writer.add_scalar(f"{metrics.name}/perplexity", metrics.perplexity, metrics.iteration)
        if metrics.sentence_loss is not None:
            self._writer.add_scalar(f"{metrics.name}/sentence_loss", metrics.sentence_loss, metrics.iteration)
        self._writer.flush()

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


def read_metrics(path: Path) -> list[Line]:
    """One dictionary per iteration of the history that the last run in `path` continued, in order.

    It joins the step's keys and the evaluations' keys. A line about an iteration that is not after all those
    before it means that a run went back there, which makes everything later void.
    """
    history: dict[int, Line] = {}
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not text.endswith("\n"):
            break  # being written at this moment
        line: Line = json.loads(text)
        iteration = line["iteration"]
        assert isinstance(iteration, int)
        is_step = "lm_loss" in line
        history = {known: old for known, old in history.items() if known < iteration + (not is_step)}
        history[iteration] = {**history.get(iteration, {}), **line}
    return list(history.values())


def to_json(line: Line) -> str:
    """JSON has no word for what is not finite, so it becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
    return json.dumps(finite, allow_nan=False)


def _without_absent(line: Line, key: str) -> Line:
    """Other models have no such figure, where null would mean one that is not finite."""
    return {name: value for name, value in line.items() if name != key or value is not None}


def _remove_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _summary_writer(folder: str, first_iteration: int) -> SummaryWriter:
    # Imported late: it takes a second that a run without TensorBoard need not wait for.
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(folder, purge_step=first_iteration)
    except OSError as error:
        raise ConfigError(
            f"--tensorboard_dir {folder} cannot be written ({error.strerror}); choose another folder.",
            this_rank_only=True,
        ) from error


def _sentence_column(sentence_loss: float | None) -> tuple[str, ...]:
    return () if sentence_loss is None else (f"sentence loss {sentence_loss:9.6f}",)


def _four_digits(value: float) -> str:
    """Always five characters below 100000: 0.123, 1.234, 12.34, 123.4, 12345 after a space where it needs four."""
    decimals = 3 if value < 9.9995 else 2 if value < 99.995 else 1 if value < 999.95 else 0
    return f"{value:5.{decimals}f}"


def _duration(seconds: float | None) -> str:
    """Eight characters: hours, minutes and seconds, or days and hours from 100 hours on."""
    if seconds is None:
        return "--:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24:3d}d {hours % 24:02d}h"
    return f"{hours:02d}:{minute:02d}:{second:02d}"
