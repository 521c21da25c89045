"""How far a tokenization is, on a terminal as a bar that moves, elsewhere as a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from megatron.data.preprocess import Progress
from megatron.errors import DataError

BAR_WIDTH = 24
REDRAW_INTERVAL_S = 0.1
# Of the lines that are left out, so many are shown.
MAX_SHOWN_ERRORS = 20


class ProgressBar:
    """Call it with every `Progress`; `close` leaves the last state on the screen.

    Rates are those of this run: the first `Progress` is what an earlier one has done already. A run that starts again
    is another one: what it did before counts neither as work nor as time. Where `stream` is no terminal, a line is
    printed each time `log_interval` more documents are done.
    """

    def __init__(self, stream: TextIO, *, log_interval: int, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._clock = clock
        self._log_interval = log_interval
        self._is_terminal = stream.isatty()
        self._start_s = self._drawn_s = clock()
        self._next_line = log_interval
        self._first: Progress | None = None
        self._latest = Progress()

    def __call__(self, progress: Progress) -> None:
        if self._first is None or progress.num_bytes < self._latest.num_bytes:
            self._first, self._start_s = progress, self._clock()
            self._next_line = _num_seen(progress) + self._log_interval
        self._latest = progress
        if self._is_terminal and self._clock() - self._drawn_s >= REDRAW_INTERVAL_S:
            self._drawn_s = self._clock()
            self._draw()
        elif not self._is_terminal and _num_seen(progress) >= self._next_line:
            self._next_line = (_num_seen(progress) // self._log_interval + 1) * self._log_interval
            print(self._describe(), file=self._stream, flush=True)

    def interrupt(self, message: str) -> None:
        """Shows a line of its own."""
        print(f"\r{message}\x1b[K" if self._is_terminal else message, file=self._stream, flush=True)

    @property
    def elapsed_s(self) -> float:
        """Since the first `Progress`, or the one that went back: what came before is start-up."""
        return self._clock() - self._start_s

    def close(self) -> None:
        if self._is_terminal:
            self._draw()
            print(file=self._stream, flush=True)

    @property
    def own(self) -> Progress:
        """What this run alone has done."""
        first = self._first or Progress()
        return Progress(
            num_bytes=self._latest.num_bytes - first.num_bytes,
            num_text_bytes=self._latest.num_text_bytes - first.num_text_bytes,
            num_documents=self._latest.num_documents - first.num_documents,
            num_tokens=self._latest.num_tokens - first.num_tokens,
        )

    def _describe(self) -> str:
        return describe(self._latest, self.own, self.elapsed_s)

    def _draw(self) -> None:
        done = _fraction(self._latest)
        bar = "#" * round(BAR_WIDTH * done) + "." * (BAR_WIDTH - round(BAR_WIDTH * done))
        # The trailing code clears what a longer line left behind.
        self._stream.write(f"\r[{bar}] {self._describe()}\x1b[K")
        self._stream.flush()


class BadLines:
    """Shows the first of the lines that --on_error skip leaves out."""

    def __init__(self, bar: ProgressBar):
        self._bar = bar
        self._num_seen = 0

    def __call__(self, error: DataError) -> None:
        self._num_seen += 1
        if self._num_seen <= MAX_SHOWN_ERRORS:
            self._bar.interrupt(f"skipped: {error}")
        if self._num_seen == MAX_SHOWN_ERRORS:
            self._bar.interrupt("further bad lines are counted only")


def describe(progress: Progress, own: Progress, elapsed_s: float) -> str:
    """One line: part done, this run's rates in MB (10^6 bytes) of text, documents and tokens, and the time left.

    `own` is the part of `progress` that this run did in `elapsed_s`.
    """
    seconds = max(elapsed_s, 1e-9)
    left = progress.total_bytes - progress.num_bytes
    eta = _minutes(elapsed_s * left / own.num_bytes) if own.num_bytes else "-"
    done = f"{_fraction(progress):4.0%} of {progress.total_bytes / 1e6:.1f} MB"
    return (
        f"{done} | {own.num_text_bytes / 1e6 / seconds:.2f} MB/s | "
        f"{progress.num_documents:,} documents, {_short(own.num_documents / seconds)}/s | "
        f"{_short(progress.num_tokens)} tokens, {_short(own.num_tokens / seconds)}/s | ETA {eta}"
    )


def _num_seen(progress: Progress) -> int:
    return progress.num_documents + progress.num_dropped + progress.num_bad


def _short(count: float) -> str:
    """Three digits or so: 999, 12.3k, 4.56M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return f"{count:.0f}"


def _fraction(progress: Progress) -> float:
    return progress.num_bytes / progress.total_bytes if progress.total_bytes else 0.0


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
