"""The chart tells the same as the simulation."""

import re

import pytest

from megatron.core.pipeline import Costs, StageCosts, draw, gpipe, interleaved, one_f_one_b, simulate


def test_the_chart_of_a_small_schedule_by_hand():
    # F takes 1 and B takes 2; a unit of time is three columns, as wide as "|F0".
    assert draw(one_f_one_b(2, 2)).split("\n") == [
        (
            "1f1b: ranks 2, stages per rank 1, micro-batches 2, time 9, bubble 3 (33.3% of the time), "
            "peak 2 live micro-batches"
        ),
        "rank 0 |F0|F1|     |B0---|  |B1---| idle 33.3%  peak 2 live",
        "rank 1    |F0|B0---|F1|B1---|     | idle 33.3%  peak 1 live",
        "F3: forward pass of micro-batch 3, B3: its backward pass, blank: idle",
    ]


@pytest.mark.parametrize("schedule", [gpipe(3, 12), one_f_one_b(4, 8), interleaved(2, 4, 3)], ids=lambda s: s.name)
def test_every_action_is_drawn_once_at_its_time(schedule):
    timeline = simulate(schedule)
    rows = draw(schedule).split("\n")[1 : 1 + len(schedule.ranks)]
    num_chunks = schedule.placement.num_chunks
    label_width = 1 + len(str(schedule.num_microbatches - 1)) + (num_chunks > 1)
    for spans, row in zip(timeline.spans, rows, strict=True):
        chart = row[len("rank 0 ") :]
        drawn = [
            (match[1], int(match[2]), match[3], match.start() / (label_width + 1))
            for match in re.finditer(r"\|([FB])(\d+)([a-z]?)", chart)
        ]
        stages = sorted({span.action.stage for span in spans})
        assert drawn == [
            (kind, microbatch, "abc"[stages.index(stage)] if num_chunks > 1 else "", start)
            for (kind, stage, microbatch), start, _ in spans
        ]


def test_uneven_stages_are_drawn_to_scale_and_no_label_is_cut():
    costs = Costs((StageCosts(0.7, 0.5, 0.4), StageCosts(1.3, 1, 1.1)))
    rows = draw(one_f_one_b(2, 3), costs).split("\n")
    for row in rows[1:3]:
        assert re.findall(r"\|([FB]\d)", row) in (
            ["F0", "F1", "B0", "F2", "B1", "B2"],
            ["F0", "B0", "F1", "B1", "F2", "B2"],
        )
    assert rows[1].index("idle") == rows[2].index("idle")
