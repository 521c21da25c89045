"""The simulator against an independent one that moves a clock tick by tick."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.pipeline import (
    Action,
    Costs,
    Placement,
    Schedule,
    ScheduleError,
    StageCosts,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
)

SCHEDULES = (gpipe(3, 4), one_f_one_b(4, 6), one_f_one_b(4, 2), interleaved(2, 4, 3), interleaved(3, 3, 2))


def tick_by_tick(schedule, forward, backward, communication):
    """{action: start} with integer times: at each tick every idle rank starts its next action if it may."""
    last = schedule.placement.num_stages - 1
    rank_of = schedule.placement.stage_ranks
    start, queues = {}, [list(actions) for actions in schedule.ranks]
    free_at = [0] * len(queues)

    def arrived(kind, stage, microbatch, rank, now):
        action = next((action for action in start if action == (kind, stage, microbatch)), None)
        if action is None:
            return False
        end = start[action] + (forward if kind == "F" else backward)[stage]
        return end + (communication if rank_of[stage] != rank else 0) <= now

    now = 0
    while any(queues):
        for rank, queue in enumerate(queues):
            if not queue or free_at[rank] > now:
                continue
            kind, stage, microbatch = queue[0]
            if kind == "F":
                may = stage == 0 or arrived("F", stage - 1, microbatch, rank, now)
            elif stage == last:
                may = arrived("F", stage, microbatch, rank, now)
            else:
                may = arrived("B", stage + 1, microbatch, rank, now)
            if may:
                start[queue.pop(0)] = now
                free_at[rank] = now + (forward if kind == "F" else backward)[stage]
        now += 1
    return start


@st.composite
def priced_schedules(draw):
    schedule = draw(st.sampled_from(SCHEDULES))
    times = st.lists(st.integers(1, 4), min_size=6, max_size=6)
    return schedule, draw(times), draw(times), draw(st.integers(0, 3))


@settings(max_examples=60)
@given(priced_schedules())
def test_uneven_stages_and_slow_links_run_as_in_a_tick_by_tick_simulation(priced):
    schedule, forward, backward, communication = priced
    stages = tuple(
        StageCosts(forward[s], backward[s] / 2, backward[s] / 2) for s in range(schedule.placement.num_stages)
    )
    timeline = simulate(schedule, Costs(stages, communication))
    expected = tick_by_tick(schedule, forward, backward, communication)
    assert {span.action: span.start for spans in timeline.spans for span in spans} == expected
    ends = {
        action: start + (forward if action.kind == "F" else backward)[action.stage]
        for action, start in expected.items()
    }
    assert timeline.makespan == max(ends.values())
    idle = [timeline.idle(rank) for rank in range(len(schedule.ranks))]
    assert timeline.bubble == pytest.approx(sum(idle) / len(idle), abs=1e-12)  # rounding of one division


def split_backward():
    """Two micro-batches on two ranks with the weight gradients last, as in ZB-H1 (Qi et al. 2024, arXiv:2401.10241)."""
    rows = "0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1F1 1I1 1W0 1W1"
    ranks = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return Schedule("split", Placement.loop(2), 2, ranks)


def test_a_split_backward_pass_has_the_bubble_and_the_peak_of_zb_h1():
    # (p - 1) (F + I - W) = 1 with F = I = W = 1; each rank holds activations of p = 2 until the W that needs them.
    timeline = simulate(split_backward(), Costs.uniform(2, forward=1, backward=2))
    assert timeline.makespan == 2 * 3 + 1
    assert timeline.bubble == 1
    assert timeline.peak_live == (2, 2)


def test_bubble_fraction_of_1f1b_is_the_share_of_the_step():
    # m (F + B) = 24 busy and (p - 1) (F + B) = 9 idle.
    assert simulate(one_f_one_b(4, 8)).bubble_fraction == 9 / 33


def test_the_slowest_stage_makes_the_others_idle_and_that_is_bubble():
    # Stage 1 takes 6 per micro-batch, stage 0 takes 3: rank 1 works 24 of 24 + 1 (first F) + 2 (last B).
    costs = Costs((StageCosts(1, 1, 1), StageCosts(2, 2, 2)))
    timeline = simulate(one_f_one_b(2, 4), costs)
    assert timeline.makespan == 27
    assert (timeline.idle(0), timeline.idle(1), timeline.bubble) == (15, 3, 9)


def test_an_action_that_waits_for_ever_is_named_with_its_rank_and_position():
    ranks = ((Action.parse("0F0"), Action.parse("0B0")), (Action.parse("1B0"), Action.parse("1F0")))
    with pytest.raises(
        ScheduleError, match="rank 0, position 1, 0B0: waits for ever for the input gradient of stage 1"
    ):
        simulate(Schedule("cyclic", Placement.loop(2), 1, ranks))
