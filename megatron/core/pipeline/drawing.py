"""A schedule as a text chart: time to the right, one row per pipeline rank."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron.core.pipeline.actions import Action, Placement, Schedule
from megatron.core.pipeline.simulation import Costs, Span, Timeline, simulate


def draw(schedule: Schedule, costs: Costs | None = None) -> str:
    """A chart whose boxes are as wide as their actions take, for a fixed-width font.

    The last line explains the labels. `costs` defaults to `Costs.uniform`.
    """
    timeline = simulate(schedule, costs)
    shortest = min(span.end - span.start for spans in timeline.spans for span in spans if span.end > span.start)
    widest_label = max(
        len(action_label(action, schedule.placement)) for actions in schedule.ranks for action in actions
    )
    columns_per_time = (widest_label + 1) / shortest  # a box is its left edge and its label

    def column(time: float) -> int:
        return math.floor(time * columns_per_time + 0.5)

    margin = len(str(len(schedule.ranks) - 1))
    lines = [_summary(schedule, timeline)]
    for pipeline_rank, spans in enumerate(timeline.spans):
        idle_percent = 100 * timeline.idle(pipeline_rank) / timeline.makespan
        boxes = _row(spans, schedule.placement, column, column(timeline.makespan))
        lines.append(
            f"rank {pipeline_rank:{margin}d} {boxes} idle {idle_percent:4.1f}%  "
            f"peak {timeline.peak_live[pipeline_rank]:g} live"
        )
    lines.append(_legend(schedule.placement))
    return "\n".join(lines)


def action_label(action: Action, placement: Placement) -> str:
    """Kind and micro-batch, then the chunk as a letter where a rank has several."""
    label = f"{action.kind.value}{action.microbatch}"
    if placement.num_chunks == 1:
        return label
    chunk = placement.stages_of(placement.stage_ranks[action.stage]).index(action.stage)
    return label + chr(ord("a") + chunk)


def _summary(schedule: Schedule, timeline: Timeline) -> str:
    placement = schedule.placement
    return (
        f"{schedule.name}: ranks {placement.num_ranks}, stages per rank {placement.num_chunks}, "
        f"micro-batches {schedule.num_microbatches}, time {timeline.makespan:g}, "
        f"bubble {timeline.bubble:g} ({timeline.bubble_fraction:.1%} of the time), "
        f"peak {max(timeline.peak_live):g} live micro-batches"
    )


def _legend(placement: Placement) -> str:
    legend = "F3: forward pass of micro-batch 3, B3: its backward pass, blank: idle"
    if placement.num_chunks > 1:
        legend += "; a, b, ...: first, second, ... stage of the rank"
    return legend


def _row(spans: tuple[Span, ...], placement: Placement, column: Callable[[float], int], width: int) -> str:
    cells = [" "] * width + ["|"]
    for action, start, end in spans:
        left, right = column(start), column(end)
        box = f"|{action_label(action, placement)}".ljust(right - left, "-")
        cells[left:right] = box[: right - left]
        if cells[right] == " ":
            cells[right] = "|"
    return "".join(cells)
