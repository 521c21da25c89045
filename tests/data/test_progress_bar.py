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


def test_the_rates_and_the_time_left_follow_from_counts_and_time():
    # A quarter of 8 MB in 2 s, unpacked to 3 MB, is 1.5 MB/s, and the other 6 MB take 6 s more.
    progress = Progress(
        num_bytes=2_000_000, total_bytes=8_000_000, num_text_bytes=3_000_000, num_documents=1234, num_tokens=500_000
    )
    line = describe(progress, progress, elapsed_s=2.0)
    assert line == (" 25% of 8.0 MB | 1.50 MB/s | 1,234 documents, 617/s | 500.00k tokens, 250.00k/s | ETA 0:00:06")


def test_what_an_earlier_run_has_done_is_progress_but_no_rate():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(stream, log_interval=1, clock=clock)
    clock.now_s = 5.0  # start-up counts as little
    bar(Progress(num_bytes=90, total_bytes=100, num_text_bytes=90, num_documents=9))
    clock.now_s = 7.0
    bar(Progress(num_bytes=92, total_bytes=100, num_text_bytes=92, num_documents=10))
    (line,) = stream.getvalue().splitlines()
    assert line.startswith(" 92% of") and "10 documents, 0/s" in line  # half a document a second, rounded
    assert line.endswith("ETA 0:00:08")  # a byte a second, and eight are left
    assert (bar.own.num_text_bytes, bar.elapsed_s) == (2, 2.0)


def test_a_run_that_starts_again_counts_anew():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(stream, log_interval=5, clock=clock)
    bar(Progress(num_bytes=90, total_bytes=100, num_text_bytes=90, num_documents=9, num_tokens=900))
    clock.now_s = 50.0
    bar(Progress(total_bytes=100))
    clock.now_s = 52.0
    bar(Progress(num_bytes=60, total_bytes=100, num_text_bytes=60, num_documents=6, num_tokens=600))
    (line,) = stream.getvalue().splitlines()
    assert line == " 60% of 0.0 MB | 0.00 MB/s | 6 documents, 3/s | 600 tokens, 300/s | ETA 0:00:01"
    assert (bar.own.num_text_bytes, bar.elapsed_s) == (60, 2.0)


def test_before_the_first_byte_no_time_is_guessed():
    assert describe(Progress(total_bytes=8), Progress(), elapsed_s=0.0).endswith("ETA -")


def test_a_message_in_between_takes_the_place_of_the_bar():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        ProgressBar(stream, log_interval=1).interrupt("skipped: a.jsonl:3")
    assert terminal.getvalue() == "\rskipped: a.jsonl:3\x1b[K\n"
    assert file.getvalue() == "skipped: a.jsonl:3\n"


def test_a_terminal_shows_a_bar_that_is_redrawn_and_ends_with_the_last_state():
    stream, clock = Terminal(), Clock()
    bar = ProgressBar(stream, log_interval=1, clock=clock)
    bar(Progress(total_bytes=100))
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
    bar(Progress(total_bytes=46))
    for num_documents in (4, 9, 12, 19, 20, 45, 46):
        clock.now_s += 1.0
        bar(Progress(num_bytes=num_documents, total_bytes=46, num_documents=num_documents - 1, num_dropped=1))
    bar.close()
    assert [line.split(" | ")[2].split(",")[0] for line in stream.getvalue().splitlines()] == [
        "11 documents",
        "19 documents",
        "44 documents",
    ]
