"""Proof that a schedule is complete and ordered, and that its program cannot deadlock.

A program is executed symbolically under the strictest rule that a transport may have: a send ends only
when its peer has come to a receive from this rank, and the two then belong together, whatever they are
called (gloo and NCCL match messages between two ranks by order, not by name). Under this rule a program
has one outcome, independent of timing, so one execution is a proof; a transport that buffers is kinder.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.pipeline.actions import Action, ActionKind, Schedule, ScheduleError, Value
from megatron.core.pipeline.lowering import Program, lower


def validate(schedule: Schedule) -> None:
    """Raise ScheduleError unless each stage runs each micro-batch forward and (but for evaluation) backward
    once, on its rank, after its inputs, and the lowered program passes `validate_program`."""
    for pipeline_rank, actions in enumerate(schedule.ranks):
        for position, action in enumerate(actions):
            if action.kind.is_communication:
                raise ScheduleError(pipeline_rank, position, action, "only a lowered program has communication")
    _check_complete(schedule, schedule.ranks)
    validate_program(lower(schedule))


def validate_program(program: Program) -> None:
    """Raise ScheduleError unless the program is complete, no value is used before it is there, messages
    match in order, and blocking sends cannot deadlock."""
    _check_complete(program.schedule, program.ranks)
    _check_peers(program)
    _execute_symbolically(program)


def _check_complete(schedule: Schedule, ranks: Sequence[Sequence[Action]]) -> None:
    """`ranks` are the schedule's own, or those of its program."""
    for pipeline_rank, actions in enumerate(ranks):
        stages = schedule.placement.stages_of(pipeline_rank)
        seen: set[Action] = set()
        for position, action in enumerate(actions):
            if action.stage not in stages:
                raise ScheduleError(pipeline_rank, position, action, f"this rank holds stages {stages} only")
            if not 0 <= action.microbatch < schedule.num_microbatches:
                reason = f"there are {schedule.num_microbatches} micro-batches"
                raise ScheduleError(pipeline_rank, position, action, reason)
            if action in seen:
                raise ScheduleError(pipeline_rank, position, action, "occurs twice")
            seen.add(action)
        for stage in stages:
            for microbatch in range(schedule.num_microbatches):
                fault = _fault(stage, microbatch, seen, has_backward=schedule.has_backward)
                if fault is not None:
                    raise ScheduleError(pipeline_rank, len(actions), *fault)


def _fault(stage: int, microbatch: int, seen: set[Action], *, has_backward: bool) -> tuple[Action, str] | None:
    """What is wrong with the set of computations of one stage for one micro-batch, if anything."""
    forward, full, input_half, weight_half = (
        Action(kind, stage, microbatch) for kind in (ActionKind.F, ActionKind.B, ActionKind.I, ActionKind.W)
    )
    done = [action for action in (full, input_half, weight_half) if action in seen]
    if forward not in seen:
        return forward, "is missing"
    if not has_backward:
        return (done[0], "is a backward pass in a forward-only schedule") if done else None
    if full in done:
        return (done[1], f"repeats a part of {full}") if len(done) > 1 else None
    if not done:
        return full, "is missing"
    if len(done) == 1:
        return (weight_half if done == [input_half] else input_half), "is missing"
    return None


def _check_peers(program: Program) -> None:
    stage_ranks = program.placement.stage_ranks
    for pipeline_rank, actions in enumerate(program.ranks):
        for position, action in enumerate(actions):
            if not action.kind.is_communication:
                continue
            other = action.counterpart.stage
            if not 0 <= other < len(stage_ranks) or stage_ranks[other] == pipeline_rank:
                raise ScheduleError(pipeline_rank, position, action, f"stage {other} is not on another rank")


def _execute_symbolically(program: Program) -> None:
    num_ranks = len(program.ranks)
    positions = [0] * num_ranks
    held: list[set[Value]] = [set() for _ in range(num_ranks)]
    progress = True
    while progress:
        progress = False
        for pipeline_rank in range(num_ranks):
            progress |= _run_until_blocked(pipeline_rank, program, positions, held)
    blocked = [rank for rank in range(num_ranks) if positions[rank] < len(program.ranks[rank])]
    if blocked:
        first = blocked[0]
        state = "; ".join(
            f"rank {rank} at position {positions[rank]}, {_current(program, positions, rank) or 'finished'}"
            for rank in range(num_ranks)
        )
        action = program.ranks[first][positions[first]]
        raise ScheduleError(first, positions[first], action, f"deadlock under blocking sends: {state}")


def _run_until_blocked(pipeline_rank: int, program: Program, positions: list[int], held: list[set[Value]]) -> bool:
    """Advance one rank, and with each of its sends the receiver; True when there was progress."""
    start = positions[pipeline_rank]
    for position in range(start, len(program.ranks[pipeline_rank])):
        action = program.ranks[pipeline_rank][position]
        if action.kind.is_receive:
            break  # the sender completes it
        needed = action.carries if action.kind.is_send else action.requires(program.placement.num_stages)
        if needed is not None and needed not in held[pipeline_rank]:
            raise ScheduleError(pipeline_rank, position, action, f"{needed} is not there yet")
        if action.kind.is_send:
            peer = program.peer(action)
            receive = _current(program, positions, peer)
            if receive is None or not receive.kind.is_receive or program.peer(receive) != pipeline_rank:
                break
            if receive != action.counterpart:
                raise ScheduleError(pipeline_rank, position, action, f"rank {peer} would take it for its {receive}")
            held[peer].add(action.carries)
            positions[peer] += 1
        elif (produced := action.produces) is not None:
            held[pipeline_rank].add(produced)
        positions[pipeline_rank] = position + 1
    return positions[pipeline_rank] > start


def _current(program: Program, positions: Sequence[int], pipeline_rank: int) -> Action | None:
    actions, position = program.ranks[pipeline_rank], positions[pipeline_rank]
    return actions[position] if position < len(actions) else None
