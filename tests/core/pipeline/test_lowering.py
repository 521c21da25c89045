"""Where sends and receives are put."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.pipeline import (
    Action,
    ActionKind,
    Costs,
    Placement,
    Program,
    Schedule,
    ScheduleError,
    StageCosts,
    gpipe,
    interleaved,
    lower,
    one_f_one_b,
    validate_program,
)

SCHEDULES = (
    gpipe(3, 4),
    one_f_one_b(1, 3),
    one_f_one_b(4, 6),
    one_f_one_b(5, 2),
    interleaved(1, 2, 2),
    interleaved(4, 8, 3),
)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{len(s.ranks)}")
def test_lowering_keeps_the_computations_in_order_and_adds_one_pair_per_value_that_changes_rank(schedule):
    program = lower(schedule)
    for actions, lowered in zip(schedule.ranks, program.ranks, strict=True):
        assert tuple(action for action in lowered if not action.kind.is_communication) == actions
    rank_of, last = schedule.placement.stage_ranks, schedule.placement.num_stages - 1
    boundaries = [(s, s + 1) for s in range(last) if rank_of[s] != rank_of[s + 1]]
    expected = {
        text
        for mb in range(schedule.num_microbatches)
        for s, t in boundaries
        for text in (f"{s}SEND_F{mb}", f"{t}RECV_F{mb}", f"{t}SEND_B{mb}", f"{s}RECV_B{mb}")
    }
    communication = [str(action) for actions in program.ranks for action in actions if action.kind.is_communication]
    assert len(communication) == len(expected) and set(communication) == expected


def test_a_single_rank_communicates_with_nobody():
    assert lower(interleaved(1, 4, 3)).ranks == interleaved(1, 4, 3).ranks


def test_the_peer_is_the_rank_of_the_neighbouring_stage():
    program = lower(interleaved(4, 4, 2))
    peers = {text: program.peer(Action.parse(text)) for text in ("3SEND_F0", "4RECV_F0", "4SEND_B0", "1RECV_B0")}
    assert peers == {"3SEND_F0": 0, "4RECV_F0": 3, "4SEND_B0": 3, "1RECV_B0": 2}


@settings(max_examples=60)
@given(st.sampled_from(SCHEDULES), st.lists(st.floats(0.1, 10), min_size=36, max_size=36), st.floats(0, 5))
def test_programs_cannot_deadlock_whatever_the_stages_cost(schedule, times, communication):
    stages = tuple(StageCosts(*times[3 * s : 3 * s + 3]) for s in range(schedule.placement.num_stages))
    validate_program(lower(schedule, Costs(stages, communication)))


def test_a_send_follows_the_computation_that_makes_its_value():
    for actions in lower(interleaved(4, 8, 2)).ranks:
        for before, action in itertools.pairwise(actions):
            if action.kind.is_send:
                computation = ActionKind.F if action.kind is ActionKind.SEND_F else ActionKind.B
                assert before == action._replace(kind=computation)


def test_the_last_stage_of_1f1b_posts_each_receive_one_computation_ahead():
    # The value of micro-batch k is received before the computation that precedes 3Fk, and waited for only at 3Fk.
    row = "3RECV_F0 3RECV_F1 3F0 3B0 3SEND_B0 3F1 3RECV_F2 3B1 3SEND_B1 3F2 3RECV_F3 3B2 3SEND_B2 3F3 3B3 3SEND_B3"
    assert " ".join(map(str, lower(one_f_one_b(4, 4)).ranks[3])) == row


def test_a_split_backward_pass_sends_after_its_first_half():
    rows = "0F0 0I0 0W0", "1F0 1I0 1W0"
    ranks = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    program = lower(Schedule("split", Placement.loop(2), 1, ranks))
    validate_program(program)
    assert " ".join(map(str, program.ranks[1])) == "1RECV_F0 1F0 1I0 1SEND_B0 1W0"


def receive_compute_send(schedule):
    """The obvious lowering, around each action: receive its input, compute, send its output."""
    ranks = []
    last = schedule.placement.num_stages - 1
    for actions in schedule.ranks:
        lowered = []
        for kind, stage, microbatch in actions:
            forward = kind is ActionKind.F
            if stage != (0 if forward else last):
                lowered.append(Action(ActionKind.RECV_F if forward else ActionKind.RECV_B, stage, microbatch))
            lowered.append(Action(kind, stage, microbatch))
            if stage != (last if forward else 0):
                lowered.append(Action(ActionKind.SEND_F if forward else ActionKind.SEND_B, stage, microbatch))
        ranks.append(tuple(lowered))
    return Program(schedule, tuple(ranks))


def test_communication_inserted_locally_works_for_gpipe_and_deadlocks_under_1f1b():
    validate_program(receive_compute_send(gpipe(2, 4)))
    with pytest.raises(ScheduleError, match=r"rank 0, position 3, 0SEND_F1: deadlock.*rank 1 at position 3, 1SEND_B0"):
        validate_program(receive_compute_send(one_f_one_b(2, 4)))
