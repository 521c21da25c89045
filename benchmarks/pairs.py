"""Measuring two sides in turn, and what the pairs say of their ratio."""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass

import torch.distributed as dist

from benchmarks.ours import Step

NUM_WARMUP_STEPS = 2
# The same arithmetic in another order; over a few dozen steps in float32 it stays far below this.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Side:
    """What one side did: the seconds of each measured step and the CPU seconds of this process in it, and the loss of
    every step, warm-up included."""

    step_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    losses: tuple[float | None, ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours was: the median over pairs, and an interval that holds the true median."""

    median: float
    low: float
    high: float


def measure_pairs(ours: Step, peer: Step, num_pairs: int) -> tuple[Side, Side]:
    """Steps of both sides in turn, in the same processes; who goes first alternates, so that a drift cancels."""
    steps = (ours, peer)
    losses: tuple[list[float | None], ...] = ([], [])
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    for pair in range(-NUM_WARMUP_STEPS, num_pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            elapsed, loss = _timed(steps[side])
            losses[side].append(loss)
            if pair >= 0:
                times[side].append(elapsed)
    return _side(times[0], losses[0]), _side(times[1], losses[1])


def losses_differ_by(ours: Side, peer: Side) -> float:
    """The largest relative difference over the steps whose losses both sides know; infinite if there are none."""
    pairs = [(a, b) for a, b in zip(ours.losses, peer.losses, strict=True) if a is not None and b is not None]
    return max((abs(a - b) / abs(b) for a, b in pairs), default=float("inf"))


def ratio_of(ours: tuple[float, ...], peer: tuple[float, ...]) -> Ratio:
    """Over the ratios of paired times, peer / ours."""
    ratios = sorted(theirs / mine for mine, theirs in zip(ours, peer, strict=True))
    low, high = interval_of_median(len(ratios))
    return Ratio(statistics.median(ratios), ratios[low], ratios[high])


def interval_of_median(num_values: int, confidence: float = 0.95) -> tuple[int, int]:
    """Positions in the sorted values between which the true median lies with `confidence`, whatever their distribution.

    The number of values below the true median is binomial with p = 1/2; the interval is the narrowest symmetric one
    that leaves out at most 1 - confidence. With fewer than 6 values that is all of them, which is less than 95%.
    """
    outside, low = 0.0, 0
    for k in range(num_values // 2):
        outside += 2 * math.comb(num_values, k) / 2**num_values
        if outside > 1 - confidence:
            break
        low = k
    return low, num_values - 1 - low


def _side(times: list[tuple[float, float]], losses: list[float | None]) -> Side:
    return Side(tuple(wall for wall, _ in times), tuple(cpu for _, cpu in times), tuple(losses))


def _timed(step: Step) -> tuple[tuple[float, float], float | None]:
    """One step, from when all processes are ready until all are done: (seconds, CPU seconds), loss."""
    gc.collect()
    _barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = step()
    cpu_s = time.process_time() - cpu_start
    _barrier()
    return (time.perf_counter() - start, cpu_s), loss


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
