from __future__ import annotations

import threading

import pytest

from megatron.data.ordered import map_in_order


def test_results_come_in_the_order_of_the_items_whatever_finishes_first():
    gate = threading.Event()

    def work(i: int) -> int:
        if i == 0:
            gate.wait()
        if i == 9:
            gate.set()
        return i * i

    assert list(map_in_order(work, range(30), workers=2, max_ahead=20)) == [i * i for i in range(30)]


def test_one_long_item_does_not_keep_the_other_thread_from_what_follows():
    later = threading.Semaphore(0)

    def work(i: int) -> int:
        if i:
            later.release()
            return i
        for _ in range(19):  # ends when the other thread has done all that may be ahead
            later.acquire()
        return 0

    assert list(map_in_order(work, range(20), workers=2, max_ahead=20)) == list(range(20))


def test_no_more_is_taken_than_may_be_ahead():
    taken = []
    gate = threading.Event()

    def items():
        for weight in [3, 4, 5, 6, 7]:
            taken.append(weight)
            if sum(taken) >= 12:
                gate.set()
            yield weight

    def work(weight: int) -> int:
        gate.wait()
        return weight

    results = map_in_order(work, items(), workers=1, max_ahead=12, weigh=int)
    assert next(results) == 3
    assert taken == [3, 4, 5]
    assert list(results) == [4, 5, 6, 7]


def test_nothing_more_is_started_once_one_has_failed():
    started = []

    def work(i):
        started.append(i)
        raise ValueError(f"item {i}")

    with pytest.raises(ValueError, match="item 0"):
        next(map_in_order(work, iter(range(100)), workers=1, max_ahead=4))
    assert len(started) <= 4  # those that were ahead already
