"""What validation rejects, decided independently by counting and by looking for cycles in a graph."""

import itertools
from collections import Counter, defaultdict
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.pipeline import (
    Action,
    Placement,
    Program,
    Schedule,
    ScheduleError,
    forward_only,
    gpipe,
    interleaved,
    lower,
    one_f_one_b,
    validate,
    validate_program,
)

SCHEDULES = (gpipe(2, 3), one_f_one_b(3, 4), one_f_one_b(2, 2), interleaved(2, 4, 2), interleaved(3, 3, 2))


def expected_actions(schedule, *, lowered):
    """Per rank, the text of each action that must be there exactly once."""
    rank_of, last = schedule.placement.stage_ranks, schedule.placement.num_stages - 1
    expected = [Counter() for _ in schedule.ranks]
    for mb in range(schedule.num_microbatches):
        for s, rank in enumerate(rank_of):
            expected[rank].update([f"{s}F{mb}", f"{s}B{mb}"])
            if lowered and s < last and rank_of[s + 1] != rank:
                expected[rank].update([f"{s}SEND_F{mb}", f"{s}RECV_B{mb}"])
                expected[rank_of[s + 1]].update([f"{s + 1}RECV_F{mb}", f"{s + 1}SEND_B{mb}"])
    return expected


def event(action):
    """The two ends of a message are one event, named by the send."""
    return str(action.counterpart if action.kind.is_receive else action)


def is_acyclic(schedule, ranks):
    """Whether program order, data dependencies and messages as shared events allow some order of all events."""
    last = schedule.placement.num_stages - 1
    before = defaultdict(set)
    for actions in ranks:
        for first, second in itertools.pairwise(actions):
            before[event(second)].add(event(first))
    lowered = {event(action) for actions in ranks for action in actions if action.kind.is_communication}
    for mb in range(schedule.num_microbatches):
        before[f"{last}B{mb}"].add(f"{last}F{mb}")
        for s in range(last):
            for producer, message, consumer in (
                (f"{s}F{mb}", f"{s}SEND_F{mb}", f"{s + 1}F{mb}"),
                (f"{s + 1}B{mb}", f"{s + 1}SEND_B{mb}", f"{s}B{mb}"),
            ):
                before[consumer].add(producer)
                if message in lowered:
                    before[message].add(producer)
                    before[consumer].add(message)
    try:
        TopologicalSorter(before).prepare()
    except CycleError:
        return False
    return True


def messages_match_in_order(program):
    posted = defaultdict(list)
    for rank, actions in enumerate(program.ranks):
        for action in actions:
            if action.kind.is_communication:
                ends = (rank, program.peer(action)) if action.kind.is_send else (program.peer(action), rank)
                posted[action.kind.is_send, ends].append(event(action))
    return all(events == posted[not sent, ends] for (sent, ends), events in list(posted.items()))


@st.composite
def mutations(draw, ranks_of):
    """A schedule of `SCHEDULES` and its rows, with one to three edits: drop, duplicate, move, swap, rename."""
    schedule = draw(st.sampled_from(SCHEDULES))
    rows = [list(row) for row in ranks_of(schedule)]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.sampled_from(rows))
        if len(row) < 2:
            continue
        i, j = draw(st.integers(0, len(row) - 1)), draw(st.integers(0, len(row) - 1))
        edit = draw(st.sampled_from(["swap", "swap neighbours", "move", "drop", "duplicate", "rename"]))
        if edit == "swap":
            row[i], row[j] = row[j], row[i]
        elif edit == "swap neighbours":
            row[i], row[i - 1] = row[i - 1], row[i]
        elif edit == "move":
            row.insert(j, row.pop(i))
        elif edit == "drop":
            row.pop(i)
        elif edit == "duplicate":
            row.insert(j, row[i])
        else:
            row[i] = row[i]._replace(microbatch=draw(st.integers(0, schedule.num_microbatches)))
    return schedule, tuple(map(tuple, rows))


def is_rejected(check, value):
    try:
        check(value)
    except ScheduleError:
        return True
    return False


@settings(max_examples=300)
@given(mutations(lambda schedule: schedule.ranks))
def test_a_mutated_schedule_is_rejected_exactly_when_it_is_broken(mutation):
    schedule, rows = mutation
    complete = [Counter(map(str, row)) for row in rows] == expected_actions(schedule, lowered=False)
    works = complete and is_acyclic(schedule, rows)
    assert is_rejected(validate, replace(schedule, ranks=rows)) == (not works)


@settings(max_examples=300)
@given(mutations(lambda schedule: lower(schedule).ranks))
def test_a_mutated_program_is_rejected_exactly_when_it_is_broken(mutation):
    schedule, rows = mutation
    program = Program(schedule, rows)
    complete = [Counter(map(str, row)) for row in rows] == expected_actions(schedule, lowered=True)
    works = complete and is_acyclic(schedule, rows) and messages_match_in_order(program)
    assert is_rejected(validate_program, program) == (not works)


def schedule_of(*rows, num_microbatches=1):
    ranks = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return Schedule("by hand", Placement.loop(len(rows)), num_microbatches, ranks)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0F0 0B0", "1F0"), "rank 1, position 1, 1B0: is missing"),
        (("0B0", "1F0 1B0"), "rank 0, position 1, 0F0: is missing"),
        (("0F0 0I0", "1F0 1B0"), "rank 0, position 2, 0W0: is missing"),
        (("0F0 0B0 0W0", "1F0 1B0"), "rank 0, position 3, 0W0: repeats a part of 0B0"),
        (("0F0 0F0 0B0", "1F0 1B0"), "rank 0, position 1, 0F0: occurs twice"),
        (("0F0 1F0 0B0", "1B0"), r"rank 0, position 1, 1F0: this rank holds stages \(0,\) only"),
        (("0F0 0F1 0B0", "1F0 1B0"), "rank 0, position 1, 0F1: there are 1 micro-batches"),
        (("0F0 0SEND_F0 0B0", "1F0 1B0"), "rank 0, position 1, 0SEND_F0: only a lowered program has communication"),
        (("0F0 0B0", "1B0 1F0"), "rank 0, position 1, 0B0: waits for ever"),
        (("0F0 0W0 0I0", "1F0 1B0"), "rank 0, position 1, 0W0: waits for ever"),
    ],
)
def test_a_rejected_schedule_is_told_by_rank_position_and_action(rows, message):
    with pytest.raises(ScheduleError, match=message):
        validate(schedule_of(*rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"), "rank 0, position 1, 0RECV_B0: deadlock.*1RECV_F0"),
        (
            ("0F0 0SEND_F0 0RECV_B0 0B0", "1F0 1RECV_F0 1B0 1SEND_B0"),
            "rank 1, position 0, 1F0: the output of stage 0 for micro-batch 0 is not there yet",
        ),
        (
            ("0SEND_F0 0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"),
            "rank 0, position 0, 0SEND_F0: the output of stage 0 for micro-batch 0 is not there yet",
        ),
        (
            ("0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1SEND_F0 1B0 1SEND_B0"),
            "rank 1, position 2, 1SEND_F0: stage 2 is not on another rank",
        ),
    ],
)
def test_a_rejected_program_is_told_by_rank_position_and_action(rows, message):
    schedule = schedule_of(*rows)
    with pytest.raises(ScheduleError, match=message):
        validate_program(Program(schedule, schedule.ranks))


def test_messages_that_the_peer_receives_in_another_order_are_rejected():
    rows = (
        "0F0 0F1 0SEND_F0 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1",
        "1RECV_F1 1RECV_F0 1F0 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
    )
    schedule = schedule_of(*rows, num_microbatches=2)
    with pytest.raises(ScheduleError, match="rank 0, position 2, 0SEND_F0: rank 1 would take it for its 1RECV_F1"):
        validate_program(Program(schedule, schedule.ranks))


def test_a_forward_only_schedule_has_every_forward_and_no_backward():
    evaluation = forward_only(Placement.loop(2), 1)
    with pytest.raises(ScheduleError, match="rank 0, position 1, 0F1: is missing"):
        validate(replace(evaluation, num_microbatches=2))
    with pytest.raises(ScheduleError, match="rank 1, position 2, 1B0: is a backward pass in a forward-only schedule"):
        validate(replace(evaluation, ranks=schedule_of("0F0", "1F0 1B0").ranks))
    with pytest.raises(ScheduleError, match="rank 0, position 1, 0B0: is missing"):
        validate(replace(evaluation, has_backward=True))


def test_the_error_carries_the_place_as_data():
    with pytest.raises(ScheduleError) as caught:
        validate(schedule_of("0F0 0B0", "1F0"))
    assert (caught.value.pipeline_rank, caught.value.position, str(caught.value.action)) == (1, 1, "1B0")
