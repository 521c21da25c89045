"""Ranks, coordinates, and the placement of layers."""

import itertools

import pytest

from megatron.core.layout import ParallelLayout, place_layers
from megatron.errors import ConfigError


def test_rank_and_coordinate_are_inverse_and_tensor_ranks_are_neighbours():
    layout = ParallelLayout(pp=3, dp=2, tp=4)
    assert [layout.rank(layout.coordinate(rank)) for rank in range(24)] == list(range(24))
    assert [layout.coordinate(rank).tp for rank in range(5)] == [0, 1, 2, 3, 0]
    assert [layout.coordinate(rank).dp for rank in range(0, 24, 4)] == [0, 1] * 3
    assert layout.coordinate(8).pp == 1


def test_data_parallel_size_is_what_tensor_and_pipeline_leave():
    assert ParallelLayout.infer(16, tp=4, pp=2) == ParallelLayout(pp=2, dp=2, tp=4)


def test_a_world_that_is_no_multiple_is_refused():
    with pytest.raises(ConfigError, match=r"6 processes cannot be divided into groups of 4 .*multiple of 4"):
        ParallelLayout.infer(6, tp=2, pp=2)


@pytest.mark.parametrize(("tp", "pp"), [(0, 1), (1, 0), (-1, 1)])
def test_an_axis_without_ranks_is_refused(tp, pp):
    with pytest.raises(ConfigError, match="an axis has at least one rank"):
        ParallelLayout.infer(1, tp=tp, pp=pp)


@pytest.mark.parametrize("num_layers", range(1, 9))
@pytest.mark.parametrize("num_stages", range(1, 5))
@pytest.mark.parametrize(("embedding_cost", "head_cost"), [(0, 0), (0.0, 1.3), (0.5, 3.0)])
def test_placement_is_contiguous_and_the_best_of_all(num_layers, num_stages, embedding_cost, head_cost):
    if num_layers < num_stages:
        with pytest.raises(ConfigError, match=f"--num_layers {num_layers} cannot fill {num_stages} pipeline stages"):
            place_layers(num_layers, num_stages)
        return
    stages = place_layers(num_layers, num_stages, embedding_cost=embedding_cost, head_cost=head_cost)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert all(len(stage) >= 1 for stage in stages)

    def makespan(counts):
        costs = list(counts)
        costs[0] += embedding_cost
        costs[-1] += head_cost
        return max(costs)

    cuts = itertools.product(range(1, num_layers + 1), repeat=num_stages)
    best = min(makespan(counts) for counts in cuts if sum(counts) == num_layers)
    assert makespan([len(stage) for stage in stages]) == best


def test_equal_layers_are_dealt_out_equally():
    assert [len(stage) for stage in place_layers(32, 4)] == [8, 8, 8, 8]
