"""Axes of a layout, made once."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distributed import run_distributed
from megatron.core.collectives import all_reduce
from megatron.core.layout import ParallelLayout
from megatron.core.topology import Axis, Topology
from megatron.errors import ConfigError

AXES = ("pp", "dp", "tp", "embedding", "world")


def members(layout: ParallelLayout) -> dict[str, tuple[tuple[int, ...], int, float]]:
    """For each axis its global ranks, this rank's place, and the sum of global ranks over its group."""
    topology = Topology.create(layout)
    facts = {}
    for name in AXES:
        axis: Axis = getattr(topology, name)
        total = all_reduce(torch.tensor(float(dist.get_rank())), axis).item()
        facts[name] = (axis.global_ranks, axis.rank, total)
    return facts


@pytest.mark.parametrize(
    "layout", [ParallelLayout(pp=2, dp=2, tp=2), ParallelLayout(pp=4, tp=2), ParallelLayout(dp=3)], ids=str
)
def test_every_axis_joins_the_ranks_that_differ_in_it_alone(layout):
    for rank, facts in enumerate(run_distributed(members, layout.world_size, layout)):
        here = layout.coordinate(rank)
        everyone = [(other, layout.coordinate(other)) for other in range(layout.world_size)]
        expected = {
            "pp": [other for other, c in everyone if (c.dp, c.tp) == (here.dp, here.tp)],
            "dp": [other for other, c in everyone if (c.pp, c.tp) == (here.pp, here.tp)],
            "tp": [other for other, c in everyone if (c.pp, c.dp) == (here.pp, here.dp)],
            "world": list(range(layout.world_size)),
        }
        ends = [other for other in expected["pp"] if layout.coordinate(other).pp in (0, layout.pp - 1)]
        expected["embedding"] = ends if rank in ends else [rank]
        for name in AXES:
            global_ranks, place, total = facts[name]
            assert list(global_ranks) == expected[name]
            assert global_ranks[place] == rank
            assert total == sum(expected[name])


def timeouts() -> list[timedelta]:
    topology = Topology.create(ParallelLayout(pp=2, dp=2), timeout=timedelta(seconds=77))
    groups = [topology.pp.group, topology.dp.group, topology.embedding.group, topology.data_mesh.get_group()]
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_the_time_out_holds_for_the_groups_of_all_axes():
    for found in run_distributed(timeouts, 4):
        assert found == [timedelta(seconds=77)] * 4


def test_one_process_needs_no_group_and_every_collective_is_the_identity():
    topology = Topology.serial()
    assert all(getattr(topology, name).group is None for name in AXES)
    x = torch.randn(3)
    assert all_reduce(x, topology.world) is x


def wrong_layout() -> str:
    with pytest.raises(ConfigError) as caught:
        Topology.create(ParallelLayout(tp=4))
    return str(caught.value)


def test_a_layout_of_another_size_is_refused():
    messages = run_distributed(wrong_layout, 2)
    assert messages == ["TP4 PP1 DP1 needs 4 processes, but 2 were started."] * 2
