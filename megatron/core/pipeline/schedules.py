"""GPipe, 1F1B, interleaved 1F1B, and forward passes alone for evaluation.

The first three are one rule: a rank runs some forward passes to warm up, then one forward and one backward
in turn, then the backward passes that are left. They differ in the length of the warm-up and, when
interleaved, in the order in which a rank visits its chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from megatron.core.pipeline.actions import Action, ActionKind, Placement, Schedule
from megatron.errors import ConfigError

ScheduleName = Literal["1f1b", "gpipe", "interleaved"]
SCHEDULE_NAMES: tuple[ScheduleName, ...] = get_args(ScheduleName)


def build_schedule(name: ScheduleName, num_ranks: int, num_microbatches: int, *, num_chunks: int = 1) -> Schedule:
    """The schedule that a `--pipeline_schedule` name stands for. `num_chunks` is the stages per rank."""
    if name == "interleaved":
        return interleaved(num_ranks, num_microbatches, num_chunks)
    if num_chunks != 1:
        raise ConfigError(
            f"--pipeline_schedule {name} holds one stage per pipeline rank, and {num_chunks} were asked for; "
            "use --pipeline_schedule interleaved, or leave out --num_layers_per_virtual_pipeline_stage."
        )
    if name == "gpipe":
        return gpipe(num_ranks, num_microbatches)
    if name == "1f1b":
        return one_f_one_b(num_ranks, num_microbatches)
    raise ConfigError(f"--pipeline_schedule {name} does not exist; use one of {', '.join(SCHEDULE_NAMES)}.")


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al. 2019, arXiv:1811.06965).

    Backward passes run in the order of the forward ones, so that gradients are summed in the same
    order as under 1F1B.
    """
    _check_sizes(num_ranks, num_microbatches, 1)
    warmup = [num_microbatches] * num_ranks
    return _schedule("gpipe", Placement.loop(num_ranks), num_microbatches, warmup, group_size=num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One forward, one backward (Narayanan et al. 2019, PipeDream, arXiv:1806.03377, with a flush):
    GPipe's bubble, but rank i holds the activations of at most p - i micro-batches."""
    _check_sizes(num_ranks, num_microbatches, 1)
    warmup = [num_ranks - 1 - rank for rank in range(num_ranks)]
    return _schedule("1f1b", Placement.loop(num_ranks), num_microbatches, warmup, group_size=num_microbatches)


def interleaved(num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """1F1B over `num_chunks` stages per rank (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    Micro-batches go in groups of p through chunk 0, then chunk 1, ...; the bubble shrinks by the number
    of chunks, the communication grows by it. With one chunk it is 1F1B.
    """
    _check_sizes(num_ranks, num_microbatches, num_chunks)
    if num_chunks == 1:
        return one_f_one_b(num_ranks, num_microbatches)
    if num_microbatches % num_ranks != 0:
        lower = num_microbatches // num_ranks * num_ranks
        fitting = f"{lower} or {lower + num_ranks}" if lower else f"{num_ranks}"
        raise ConfigError(
            f"{num_microbatches} micro-batches cannot be interleaved over --pipeline_model_parallel_size {num_ranks}: "
            f"their number must be a multiple of it; choose --global_batch_size and --micro_batch_size so that each "
            f"data-parallel rank has {fitting}, or use --pipeline_schedule 1f1b."
        )
    warmup = [2 * (num_ranks - 1 - rank) + (num_chunks - 1) * num_ranks for rank in range(num_ranks)]
    placement = Placement.loop(num_ranks, num_chunks)
    return _schedule("interleaved", placement, num_microbatches, warmup, group_size=num_ranks)


def forward_only(placement: Placement, num_microbatches: int) -> Schedule:
    """Evaluation: forward passes of any number of micro-batches, in the order of `interleaved`, nothing kept."""
    _check_sizes(placement.num_ranks, num_microbatches, placement.num_chunks)
    ranks = tuple(
        tuple(_visits(ActionKind.F, placement.stages_of(rank), num_microbatches, group_size=placement.num_ranks))
        for rank in range(placement.num_ranks)
    )
    return Schedule("forward_only", placement, num_microbatches, ranks, has_backward=False)


def _schedule(
    name: str, placement: Placement, num_microbatches: int, warmup: Sequence[int], *, group_size: int
) -> Schedule:
    """`warmup[rank]` forward passes come before the first pair of a forward and a backward."""
    ranks = []
    for rank, num_warmup in enumerate(warmup):
        stages = placement.stages_of(rank)
        forwards = _visits(ActionKind.F, stages, num_microbatches, group_size)
        backwards = _visits(ActionKind.B, stages[::-1], num_microbatches, group_size)
        ranks.append(_warm_up_then_alternate(forwards, backwards, num_warmup))
    return Schedule(name, placement, num_microbatches, tuple(ranks))


def _visits(kind: ActionKind, stages: Sequence[int], num_microbatches: int, group_size: int) -> list[Action]:
    """A group of micro-batches passes all `stages` before the next group begins; the last one may be smaller."""
    return [
        Action(kind, stage, microbatch)
        for start in range(0, num_microbatches, group_size)
        for stage in stages
        for microbatch in range(start, min(start + group_size, num_microbatches))
    ]


def _warm_up_then_alternate(forwards: list[Action], backwards: list[Action], num_warmup: int) -> tuple[Action, ...]:
    num_warmup = min(num_warmup, len(forwards))
    pairs = zip(forwards[num_warmup:], backwards, strict=False)  # the cool-down has backward passes alone
    steady = [action for pair in pairs for action in pair]
    return (*forwards[:num_warmup], *steady, *backwards[len(forwards) - num_warmup :])


def _check_sizes(num_ranks: int, num_microbatches: int, num_chunks: int) -> None:
    if num_ranks < 1:
        raise ConfigError(f"--pipeline_model_parallel_size {num_ranks} is not a number of ranks; use 1 or more.")
    if num_microbatches < 1:
        raise ConfigError(
            f"{num_microbatches} micro-batches per step are too few; raise --global_batch_size to at least "
            "--micro_batch_size times the data-parallel size."
        )
    if num_chunks < 1:
        raise ConfigError(
            f"{num_chunks} stages per pipeline rank are too few; lower --num_layers_per_virtual_pipeline_stage."
        )
