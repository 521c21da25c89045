"""The schedules against their closed forms, and proofs that their programs cannot deadlock.

With rank-level times F and B, p ranks, m micro-batches and v chunks per rank:

- GPipe and 1F1B: bubble (p - 1) (F + B); interleaved: (p - 1) (F + B) / v
- peak live micro-batches on rank i: GPipe m; 1F1B min(m, p - i);
  interleaved min(m v, 2 (p - i - 1) + (v - 1) p + 1) / v
"""

import pytest

from megatron.core.pipeline import (
    SCHEDULE_NAMES,
    Costs,
    Placement,
    build_schedule,
    forward_only,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
    validate,
)
from megatron.errors import ConfigError

all_pipeline_sizes = pytest.mark.parametrize("p", range(1, 9))
ALL_NUM_MICROBATCHES = range(1, 33)
# Times of one stage. They are small integers, so that sums and halves are exact in floating point.
STAGE_TIMES = ((1, 2), (3, 2))


def assert_bubble_and_peaks(schedule, bubble_per_stage_time, peak_live):
    for forward, backward in STAGE_TIMES:
        timeline = simulate(schedule, Costs.uniform(schedule.placement.num_stages, forward=forward, backward=backward))
        busy = schedule.num_microbatches * schedule.placement.num_chunks * (forward + backward)
        assert timeline.makespan - busy == timeline.bubble == bubble_per_stage_time * (forward + backward)
        assert list(timeline.peak_live) == peak_live


@all_pipeline_sizes
def test_gpipe_has_its_closed_forms_and_cannot_deadlock(p):
    for m in ALL_NUM_MICROBATCHES:
        schedule = gpipe(p, m)
        assert_bubble_and_peaks(schedule, p - 1, [m] * p)
        validate(schedule)


@all_pipeline_sizes
def test_1f1b_has_its_closed_forms_and_cannot_deadlock(p):
    for m in ALL_NUM_MICROBATCHES:
        schedule = one_f_one_b(p, m)
        assert_bubble_and_peaks(schedule, p - 1, [min(m, p - i) for i in range(p)])
        validate(schedule)


@pytest.mark.parametrize("v", [2, 3, 4])
@all_pipeline_sizes
def test_interleaved_has_its_closed_forms_and_cannot_deadlock(p, v):
    for m in range(p, ALL_NUM_MICROBATCHES.stop, p):
        schedule = interleaved(p, m, v)
        peaks = [min(m * v, 2 * (p - i - 1) + (v - 1) * p + 1) / v for i in range(p)]
        # One stage takes 1 / v of a rank's time: (p - 1) (F + B) / v is p - 1 times a stage's F + B.
        assert_bubble_and_peaks(schedule, p - 1, peaks)
        validate(schedule)


def test_interleaving_one_chunk_is_1f1b_for_any_number_of_microbatches():
    for p in range(1, 9):
        for m in range(1, 20):
            assert interleaved(p, m, 1) == one_f_one_b(p, m)


@all_pipeline_sizes
def test_evaluation_takes_any_number_of_microbatches_and_cannot_deadlock(p):
    for v in (1, 2, 3):
        for m in (1, 2, 5, 8, 13):
            schedule = forward_only(Placement.loop(p, v), m)
            validate(schedule)
            timeline = simulate(schedule)
            assert timeline.peak_live == (1 / v,) * p
            if m % p == 0:  # only filling and draining the pipeline costs: m v forwards of 1 on each rank
                assert timeline.bubble == p - 1


def test_every_schedule_runs_the_microbatches_of_a_stage_in_order_so_that_gradients_are_summed_alike():
    for schedule in (gpipe(4, 8), one_f_one_b(4, 8), interleaved(4, 8, 2)):
        for stage in range(schedule.placement.num_stages):
            actions = schedule.ranks[schedule.placement.stage_ranks[stage]]
            for kind in "FB":
                order = [action.microbatch for action in actions if action.stage == stage and action.kind == kind]
                assert order == list(range(8))


def test_a_name_builds_the_schedule_that_carries_it():
    assert [build_schedule(name, 4, 8).name for name in SCHEDULE_NAMES[:2]] == ["1f1b", "gpipe"]
    assert build_schedule("interleaved", 4, 8, num_chunks=2) == interleaved(4, 8, 2)


@pytest.mark.parametrize(("num_microbatches", "fitting"), [(6, "has 4 or 8"), (3, "has 4,"), (9, "has 8 or 12")])
def test_interleaving_says_which_numbers_of_microbatches_fit(num_microbatches, fitting):
    with pytest.raises(ConfigError) as caught:
        interleaved(4, num_microbatches, 2)
    message = str(caught.value)
    assert message.startswith(f"{num_microbatches} micro-batches cannot be interleaved over")
    assert "--pipeline_model_parallel_size 4" in message and fitting in message
    assert "--global_batch_size" in message and "--micro_batch_size" in message


@pytest.mark.parametrize(
    ("arguments", "num_chunks", "message"),
    [
        (("1f1b", 2, 4), 2, "--pipeline_schedule 1f1b holds one stage per pipeline rank, and 2 were asked for"),
        (("gpipe", 2, 4), 3, "--pipeline_schedule gpipe holds one stage per pipeline rank, and 3 were asked for"),
        (("gpip", 2, 4), 1, "--pipeline_schedule gpip does not exist; use one of 1f1b, gpipe, interleaved"),
        (("1f1b", 0, 4), 1, "--pipeline_model_parallel_size 0 is not a number of ranks"),
        (("gpipe", 2, 0), 1, "0 micro-batches per step are too few; raise --global_batch_size"),
        (("interleaved", 2, 4), 0, "0 stages per pipeline rank are too few; lower --num_layers_per_virtual"),
    ],
)
def test_sizes_that_make_no_schedule_are_refused(arguments, num_chunks, message):
    with pytest.raises(ConfigError, match=message):
        build_schedule(*arguments, num_chunks=num_chunks)
