"""Best-fit decreasing: the C++ plan is the oracle's, fills nearly everything, and loses nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron.data import helpers


def oracle(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    rooms: list[int] = []
    touched: list[int] = []  # when a bin came to have its room
    for time, item in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [b for b, room in enumerate(rooms) if room >= lengths[item]]
        if not fitting:
            bins.append([])
            rooms.append(capacity)
            touched.append(time)
            fitting = [len(bins) - 1]
        chosen = min(fitting, key=lambda b: (rooms[b], -touched[b]))
        bins[chosen].append(item)
        rooms[chosen] -= lengths[item]
        touched[chosen] = time
    return bins


def plan(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    items, starts = helpers.build_packing_plan(lengths, capacity)
    assert items.dtype == np.int32 and starts.dtype == np.int64
    return [items[a:b].tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("seed", range(40))
def test_the_plan_is_the_oracles(seed: int):
    random = np.random.default_rng(seed)
    # Around the powers of 64, where the tree of words changes its depth.
    capacity = int(random.choice([1, 2, 7, 62, 63, 64, 65, 300, 4095, 4096, 4097, 262_144]))
    lengths = random.integers(1, capacity, int(random.integers(0, 120)), dtype=np.int32, endpoint=True)
    if seed % 2:
        lengths = np.minimum(lengths, max(1, capacity // int(random.integers(1, 9)))).astype(np.int32)
    assert plan(lengths, capacity) == oracle(lengths.tolist(), capacity)


def test_a_log_normal_corpus_fills_98_percent_and_no_plan_could_do_much_better():
    random = np.random.default_rng(0)
    capacity = 2049
    lengths = np.clip(random.lognormal(5.9, 0.9, 20_000), 1, capacity).astype(np.int32)
    items, starts = helpers.build_packing_plan(lengths, capacity)
    assert sorted(items.tolist()) == list(range(len(lengths)))
    filled = np.add.reduceat(lengths[items], starts[:-1])
    assert filled.max() <= capacity
    num_bins = len(filled)
    assert lengths.sum() / (num_bins * capacity) >= 0.98
    # Fewer bins than these hold less than all tokens.
    assert num_bins <= 1.02 * -(-int(lengths.sum()) // capacity)


def test_halves_thirds_and_wholes_fill_everything():
    lengths = np.array([6] * 4 + [3] * 8 + [2] * 12, dtype=np.int32)
    filled = [sum(lengths[i] for i in items) for items in plan(lengths, 6)]
    assert filled == [6] * (4 + 4 + 4)


def test_lengths_that_fit_no_bin_are_refused():
    for lengths, capacity, error, message in [
        ([3, 0], 4, IndexError, r"length 0 at position 1 is not in \[1, 5\)"),
        ([5], 4, IndexError, "length 5 at position 0"),
        ([1], 0, ValueError, "capacity = 0"),
        ([[1]], 4, ValueError, "lengths must have one dimension"),
    ]:
        with pytest.raises(error, match=message):
            helpers.build_packing_plan(np.array(lengths, dtype=np.int32), capacity)
    with pytest.raises(ValueError, match="lengths must be int32"):
        helpers.build_packing_plan(np.array([1]), 4)
