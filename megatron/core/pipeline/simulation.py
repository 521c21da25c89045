"""When each action of a schedule runs, how long ranks idle, and how many activations they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.pipeline.actions import Action, ActionKind, Schedule, ScheduleError, Value


@dataclass(frozen=True)
class StageCosts:
    """Times of one stage for one micro-batch, in any unit. A full backward pass takes both gradients."""

    forward: float
    input_grad: float
    weight_grad: float

    def __post_init__(self) -> None:
        assert self.forward > 0 and self.input_grad > 0 and self.weight_grad >= 0, f"{self}: times must be positive"

    def of(self, kind: ActionKind) -> float:
        match kind:
            case ActionKind.F:
                return self.forward
            case ActionKind.B:
                return self.input_grad + self.weight_grad
            case ActionKind.I:
                return self.input_grad
            case ActionKind.W:
                return self.weight_grad
        raise ValueError(f"{kind.value} is communication and has no stage cost")


@dataclass(frozen=True)
class Costs:
    """Costs of every stage, and the time a value needs from one rank to another.

    A message delays the rank that waits for it and nobody else: sends are asynchronous.
    """

    stages: tuple[StageCosts, ...]
    communication: float = 0.0

    @classmethod
    def uniform(
        cls, num_stages: int, *, forward: float = 1.0, backward: float = 2.0, communication: float = 0.0
    ) -> Costs:
        """Equal stages. The default ratio is that of matmuls: two of them backward for one forward."""
        return cls((StageCosts(forward, backward / 2, backward / 2),) * num_stages, communication)


class Span(NamedTuple):
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """`spans[pipeline_rank]` are a rank's actions in order, with their times.

    `bubble` is the idle time of a rank, averaged over the ranks: makespan - m (F + B) where all stages
    cost the same; where they do not, what the slowest stage costs the others is part of it.
    `peak_live[pipeline_rank]` counts micro-batches whose activations the rank holds at once, from the
    start of `F` to the end of `B` (or `W`); one chunk of a micro-batch counts 1 / num_chunks.
    """

    spans: tuple[tuple[Span, ...], ...]
    makespan: float
    bubble: float
    peak_live: tuple[float, ...]

    @property
    def bubble_fraction(self) -> float:
        """The share of the step's time in which an average rank idles."""
        return self.bubble / self.makespan

    def idle(self, pipeline_rank: int) -> float:
        return self.makespan - sum(span.end - span.start for span in self.spans[pipeline_rank])


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run every rank's actions in order, each as soon as its input is there.

    `costs` defaults to `Costs.uniform`. Raises ScheduleError where a rank would wait for ever.
    """
    if costs is None:
        costs = Costs.uniform(schedule.placement.num_stages)
    spans = _earliest_spans(schedule, costs)
    makespan = max(rank_spans[-1].end for rank_spans in spans)
    busy = sum(span.end - span.start for rank_spans in spans for span in rank_spans)
    return Timeline(
        spans=tuple(map(tuple, spans)),
        makespan=makespan,
        bubble=(makespan * len(spans) - busy) / len(spans),
        peak_live=tuple(_peak_chunks(schedule, actions) / schedule.placement.num_chunks for actions in schedule.ranks),
    )


def _earliest_spans(schedule: Schedule, costs: Costs) -> list[list[Span]]:
    spans: list[list[Span]] = [[] for _ in schedule.ranks]
    ready: dict[Value, float] = {}
    progress = True
    while progress:
        progress = False
        for actions, rank_spans in zip(schedule.ranks, spans, strict=True):
            progress |= _advance(actions, rank_spans, ready, schedule, costs)
    for pipeline_rank, (actions, rank_spans) in enumerate(zip(schedule.ranks, spans, strict=True)):
        position = len(rank_spans)
        if position < len(actions):
            action = actions[position]
            needed = action.requires(schedule.placement.num_stages)
            raise ScheduleError(pipeline_rank, position, action, f"waits for ever for {needed}")
    return spans


def _advance(
    actions: Sequence[Action], rank_spans: list[Span], ready: dict[Value, float], schedule: Schedule, costs: Costs
) -> bool:
    """Append the spans of one rank until it must wait; True when there were any. `ready` has end times."""
    stage_ranks = schedule.placement.stage_ranks
    before = len(rank_spans)
    clock = rank_spans[-1].end if rank_spans else 0.0
    for position in range(before, len(actions)):
        action = actions[position]
        needed = action.requires(len(stage_ranks))
        start = clock
        if needed is not None:
            if needed not in ready:
                break
            is_local = stage_ranks[needed.stage] == stage_ranks[action.stage]
            start = max(clock, ready[needed] + (0.0 if is_local else costs.communication))
        clock = start + costs.stages[action.stage].of(action.kind)
        rank_spans.append(Span(action, start, clock))
        produced = action.produces
        if produced is not None:
            ready[produced] = clock
    return len(rank_spans) > before


def _peak_chunks(schedule: Schedule, actions: Sequence[Action]) -> int:
    if not schedule.has_backward:
        return 1  # nothing is kept once a forward pass ends
    live = peak = 0
    for action in actions:
        if action.kind is ActionKind.F:
            live += 1
            peak = max(peak, live)
        elif action.kind is not ActionKind.I:  # the weight gradient still needs what F saved
            live -= 1
    return peak
