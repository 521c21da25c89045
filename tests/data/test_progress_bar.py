from __future__ import annotations

import io

from megatron.data.preprocess import Progress
from megatron.data.progress_bar import ProgressBar, describe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_rate_and_the_time_left_follow_from_bytes_and_time():
    # A quarter of 8 MB in 2 s is 1 MB/s, and the other 6 MB take 6 s more.
    progress = Progress(num_bytes=2_000_000, total_bytes=8_000_000, num_documents=1234, num_tokens=500_000)
    line = describe(progress, elapsed_s=2.0)
    assert line == " 25% 2.0/8.0 MB | 1.00 MB/s | 1,234 documents | 500,000 tokens | ETA 0:00:06"


def test_before_the_first_byte_no_time_is_guessed():
    assert describe(Progress(total_bytes=8), elapsed_s=0.0).endswith("ETA -")


def test_a_terminal_shows_a_bar_that_is_redrawn_and_ends_with_the_last_state():
    stream, clock = Terminal(), Clock()
    bar = ProgressBar(stream, log_interval=1, clock=clock)
    clock.now_s = 1.0
    bar(Progress(num_bytes=50, total_bytes=100, num_documents=1))
    bar(Progress(num_bytes=75, total_bytes=100, num_documents=2))  # at the same time: not drawn
    clock.now_s = 1.05
    bar(Progress(num_bytes=100, total_bytes=100, num_documents=3))
    bar.close()
    drawn = stream.getvalue().split("\r")[1:]
    assert ["100%" in line for line in drawn] == [False, True]
    assert drawn[0].startswith("[" + 12 * "#" + 12 * "." + "]  50%")
    assert drawn[1].endswith("\n")


def test_elsewhere_a_line_appears_each_time_the_interval_is_passed():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(stream, log_interval=10, clock=clock)
    for num_documents in (4, 9, 12, 19, 20, 45, 46):
        clock.now_s += 1.0
        bar(Progress(num_bytes=num_documents, total_bytes=46, num_documents=num_documents - 1, num_dropped=1))
    bar.close()
    assert [line.split(" | ")[2] for line in stream.getvalue().splitlines()] == [
        "11 documents",
        "19 documents",
        "44 documents",
    ]
