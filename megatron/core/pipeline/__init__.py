"""Pipeline schedules as data: made, validated, simulated, drawn and lowered by pure functions."""

from megatron.core.pipeline.actions import Action, ActionKind, Placement, Schedule, ScheduleError, Value
from megatron.core.pipeline.drawing import draw
from megatron.core.pipeline.lowering import Program, lower
from megatron.core.pipeline.schedules import (
    SCHEDULE_NAMES,
    ScheduleName,
    build_schedule,
    forward_only,
    gpipe,
    interleaved,
    one_f_one_b,
)
from megatron.core.pipeline.simulation import Costs, Span, StageCosts, Timeline, simulate
from megatron.core.pipeline.validation import validate, validate_program

__all__ = [
    "SCHEDULE_NAMES",
    "Action",
    "ActionKind",
    "Costs",
    "Placement",
    "Program",
    "Schedule",
    "ScheduleError",
    "ScheduleName",
    "Span",
    "StageCosts",
    "Timeline",
    "Value",
    "build_schedule",
    "draw",
    "forward_only",
    "gpipe",
    "interleaved",
    "lower",
    "one_f_one_b",
    "simulate",
    "validate",
    "validate_program",
]
