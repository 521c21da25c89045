"""The learning rate against closed forms, at the iterations where something changes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import pytest

from megatron.optimizer.config import OptimizerConfig
from megatron.optimizer.schedule import learning_rate

CONFIG = OptimizerConfig(lr=3e-4, min_lr=3e-5, lr_decay_iters=100, lr_warmup_iters=10)
Style = Literal["constant", "linear", "cosine", "inverse-square-root"]
STYLES = get_args(Style)


@pytest.mark.parametrize("style", STYLES)
def test_warm_up_rises_linearly_and_its_first_update_already_moves(style: Style) -> None:
    config = replace(CONFIG, lr_decay_style=style)
    assert [learning_rate(config, i) for i in range(1, 11)] == pytest.approx([3e-5 * i for i in range(1, 11)])


@pytest.mark.parametrize("style", STYLES)
def test_without_warm_up_the_first_update_is_on_the_decay_curve(style: Style) -> None:
    config = replace(CONFIG, lr_decay_style=style, lr_warmup_iters=0)
    progress = 1 / 100
    expected = {
        "constant": 3e-4,
        "linear": 3e-5 + 2.7e-4 * (1 - progress),
        "cosine": 3e-5 + 2.7e-4 * (1 + math.cos(math.pi * progress)) / 2,
        "inverse-square-root": 3e-4,
    }
    assert learning_rate(config, 1) == pytest.approx(expected[style], rel=1e-14)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_halfway_through_the_decay_the_rate_is_the_mean_of_its_ends(style: Style) -> None:
    assert learning_rate(replace(CONFIG, lr_decay_style=style), 55) == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-14)


@pytest.mark.parametrize("style", ["linear", "cosine", "inverse-square-root"])
def test_the_decay_never_rises_and_ends_at_min_lr_for_good(style: Style) -> None:
    config = replace(CONFIG, lr_decay_style=style)
    rates = [learning_rate(config, i) for i in range(10, 103)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-3:] == [3e-5] * 3  # iterations 100, 101, 102


def test_inverse_square_root_halves_when_the_iteration_is_four_times_the_warm_up() -> None:
    config = replace(CONFIG, lr_decay_style="inverse-square-root", min_lr=0.0)
    assert learning_rate(config, 40) == pytest.approx(1.5e-4, rel=1e-14)


def test_inverse_square_root_never_falls_below_min_lr() -> None:
    config = replace(CONFIG, lr_decay_style="inverse-square-root", min_lr=2e-4)
    assert learning_rate(config, 90) == 2e-4  # 3e-4 * sqrt(10 / 90) is 1e-4


def test_constant_stays_at_lr_past_the_last_decay_iteration() -> None:
    assert learning_rate(replace(CONFIG, lr_decay_style="constant"), 1000) == 3e-4


def test_a_warm_up_fraction_is_a_share_of_the_decay_iterations() -> None:
    config = replace(CONFIG, lr_warmup_iters=0, lr_warmup_fraction=0.1)
    assert [learning_rate(config, i) for i in range(1, 101)] == [learning_rate(CONFIG, i) for i in range(1, 101)]
