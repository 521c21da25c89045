"""How far a tokenization is, on a terminal as a bar that moves, elsewhere as a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from megatron.data.preprocess import Progress

BAR_WIDTH = 24
REDRAW_INTERVAL_S = 0.1


class ProgressBar:
    """Call it with every `Progress`; `close` leaves the last state on the screen.

    Where `stream` is no terminal, a line is printed each time `log_interval` more documents are done.
    """

    def __init__(self, stream: TextIO, *, log_interval: int, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._clock = clock
        self._log_interval = log_interval
        self._is_terminal = stream.isatty()
        self._start_s = clock()
        self._drawn_s = self._start_s
        self._next_line = log_interval
        self._latest = Progress()

    def __call__(self, progress: Progress) -> None:
        self._latest = progress
        num_seen = progress.num_documents + progress.num_dropped
        if self._is_terminal and self._clock() - self._drawn_s >= REDRAW_INTERVAL_S:
            self._drawn_s = self._clock()
            self._draw()
        elif not self._is_terminal and num_seen >= self._next_line:
            self._next_line = (num_seen // self._log_interval + 1) * self._log_interval
            print(describe(progress, self.elapsed_s), file=self._stream, flush=True)

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start_s

    def close(self) -> None:
        if self._is_terminal:
            self._draw()
            print(file=self._stream, flush=True)

    def _draw(self) -> None:
        done = _fraction(self._latest)
        bar = "#" * round(BAR_WIDTH * done) + "." * (BAR_WIDTH - round(BAR_WIDTH * done))
        # The trailing code clears what a longer line left behind.
        self._stream.write(f"\r[{bar}] {describe(self._latest, self.elapsed_s)}\x1b[K")
        self._stream.flush()


def describe(progress: Progress, elapsed_s: float) -> str:
    """One line: part done, rate in MB (10^6 bytes of input) per second, counts, and the time left."""
    done = _fraction(progress)
    rate = progress.num_bytes / 1e6 / elapsed_s if elapsed_s > 0 else 0.0
    eta = f"{_minutes(elapsed_s * (1 - done) / done)}" if done > 0 else "-"
    return (
        f"{done:4.0%} {progress.num_bytes / 1e6:.1f}/{progress.total_bytes / 1e6:.1f} MB | {rate:.2f} MB/s | "
        f"{progress.num_documents:,} documents | {progress.num_tokens:,} tokens | ETA {eta}"
    )


def _fraction(progress: Progress) -> float:
    return progress.num_bytes / progress.total_bytes if progress.total_bytes else 0.0


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
