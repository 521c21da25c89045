"""Every comparison compares the same work: both sides of each train alike at the trial size."""

import json
from dataclasses import asdict

import pytest

from benchmarks.comparisons import COMPARISONS
from benchmarks.pairs import LOSS_TOLERANCE, Ratio
from benchmarks.report import one_line, read_result
from benchmarks.worker import Result, compare
from benchmarks.workload import SIZES
from distributed import run_distributed

EXAMPLE = Result(
    name="tp",
    size="S",
    ours="TP 2",
    peer="DTensor",
    ratio=Ratio(1.2, 1.1, 1.3),
    cpu_ratio=Ratio(1.2, 1.1, 1.3),
    bar=1.3,
    num_pairs=10,
    ours_step_s=1.0,
    peer_step_s=1.2,
    ours_tokens_per_s=4096.0,
    ours_gflops=100.0,
    loss_difference=0.0,
    hardware="2 x CPU",
    torch_version="2.13.0",
    load_before=0.1,
    date="2000-01-01 00:00 UTC",
    profiles=("ours", "peer"),
)


def compare_on_rank(name):
    result = compare(name, COMPARISONS[name], SIZES["XS"], 1, 0.0)
    return None if result is None else result.loss_difference


@pytest.mark.parametrize("name", [name for name in COMPARISONS if name != "compile"])
def test_both_sides_have_the_same_losses(name):
    """`compare` itself refuses other losses; that there were losses to compare is what is seen here."""
    comparison = COMPARISONS[name]
    if comparison.num_processes == 1:
        differences = [compare_on_rank(name)]
    else:
        differences = run_distributed(compare_on_rank, comparison.num_processes, name, timeout_s=120)
    assert differences[:-1] == [None] * (comparison.num_processes - 1)
    assert 0 <= differences[-1] <= LOSS_TOLERANCE


def test_a_result_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "S-tp.json"
    path.write_text(json.dumps(asdict(EXAMPLE)))
    assert read_result(path) == EXAMPLE


def test_a_ratio_below_its_bar_is_called_short():
    assert " short " in one_line(EXAMPLE)
