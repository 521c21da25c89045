"""What the benchmarks say of pairs of times follows from order statistics, and needs equal losses."""

import random

import pytest

from benchmarks.pairs import NUM_WARMUP_STEPS, Side, interval_of_median, losses_differ_by, measure_pairs, ratio_of


@pytest.mark.parametrize(("num_pairs", "positions"), [(5, (0, 4)), (6, (0, 5)), (10, (1, 8)), (20, (5, 14))])
def test_interval_has_the_tabulated_ranks(num_pairs, positions):
    """Ranks of the sign test in any table of nonparametric statistics: 1..6 of 6, 2..9 of 10, 6..15 of 20."""
    assert interval_of_median(num_pairs) == positions


def test_interval_holds_the_true_median_as_often_as_it_says():
    draw = random.Random(1).lognormvariate
    low, high = interval_of_median(10)
    trials = [sorted(draw(0, 1) for _ in range(10)) for _ in range(4000)]  # the true median is 1
    share = sum(values[low] <= 1 <= values[high] for values in trials) / len(trials)
    # 1 - 2 (1 + 10) / 2^10 = 0.9785; the standard error of 4000 trials is 0.0023.
    assert share == pytest.approx(0.9785, abs=4 * 0.0023)


def test_ratio_is_the_peers_time_over_ours():
    ratio = ratio_of((2.0, 2.0, 1.0), (4.0, 3.0, 5.0))
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.5, 5.0)


def test_sides_take_turns_and_alternate_who_goes_first():
    order = []

    def side(name):
        return lambda: order.append(name) or float(len(order))

    ours, peer = measure_pairs(side("a"), side("b"), 3)
    assert "".join(order) == "abba" + "abbaab"
    assert len(ours.step_s) == len(peer.cpu_s) == 3
    assert len(ours.losses) == len(peer.losses) == 3 + NUM_WARMUP_STEPS


def test_losses_are_compared_where_both_are_known():
    ours, peer = (Side((), (), losses) for losses in ((2.0, None, 1.0), (2.0, 3.0, 1.25)))
    assert losses_differ_by(ours, peer) == pytest.approx(0.2)


def test_without_a_loss_to_compare_nothing_agrees():
    assert losses_differ_by(Side((), (), (1.0, None)), Side((), (), (None, 1.0))) == float("inf")
