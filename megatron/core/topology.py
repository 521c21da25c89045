"""The process group and the named axes of this rank. The only place that starts a process group or a DeviceMesh."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron.core.layout import Coordinate, ParallelLayout
from megatron.errors import ConfigError

DEFAULT_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class LaunchEnvironment:
    """What torchrun says of this process; one process on its own when it was not started by torchrun."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_launched(self) -> bool:
        return "RANK" in os.environ


def launch_environment() -> LaunchEnvironment:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; starts nothing."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return LaunchEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )


@dataclass(frozen=True)
class Axis:
    """One named axis as this rank sees it. With size 1 there is no group and every collective is the identity.

    `global_ranks[i]` is the global rank of the i-th member; `rank` is this process's place among them.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    global_ranks: tuple[int, ...] = (0,)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Topology:
    """The layout and this rank's axes in it.

    `embedding` joins the first and the last pipeline rank, which share tied embeddings (size 1 on the
    ranks between). `data_mesh` is the one-dimensional mesh of the data axis that FSDP shards over.
    """

    layout: ParallelLayout
    pp: Axis
    dp: Axis
    tp: Axis
    embedding: Axis
    world: Axis
    device: torch.device
    data_mesh: DeviceMesh | None = None

    @classmethod
    def serial(cls, device: torch.device | str = "cpu") -> Topology:
        """One process without a process group."""
        return cls(
            ParallelLayout(),
            pp=Axis("pp"),
            dp=Axis("dp"),
            tp=Axis("tp"),
            embedding=Axis("embedding"),
            world=Axis("world"),
            device=torch.device(device),
        )

    @classmethod
    def create(
        cls, layout: ParallelLayout, device: torch.device | str = "cpu", *, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> Topology:
        """Starts the process group (or takes the one that runs) and makes the groups of all axes, with one time-out.

        `device` "cuda" takes this process's own GPU. A single process gets a group of its own, so that
        the data-parallel engine works the same way in one process as in many.
        """
        device = _start(torch.device(device), timeout)
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if layout.world_size != world_size:
            raise ConfigError(f"{layout} needs {layout.world_size} processes, but {world_size} were started.")
        here = layout.coordinate(rank)
        everywhere = [layout.coordinate(other) for other in range(world_size)]
        make = partial(_axis, layout, here, everywhere, timeout=timeout)
        dp = make("dp", lambda other: (other.pp, other.tp))
        return cls(
            layout,
            pp=make("pp", lambda other: (other.dp, other.tp)),
            dp=dp,
            tp=make("tp", lambda other: (other.pp, other.dp)),
            embedding=make("embedding", lambda other: _pipeline_end(layout, other)),
            world=Axis(
                "world", world_size, rank, dist.group.WORLD if world_size > 1 else None, tuple(range(world_size))
            ),
            device=device,
            data_mesh=_data_mesh(dp, device, timeout),
        )

    def second_world(self, timeout: timedelta = DEFAULT_TIMEOUT) -> Axis:
        """All ranks once more, over a gloo group of their own: for a thread beside the one that trains.

        Collectives of two threads on one group would meet in another order on another rank. Every rank calls it
        together; each call makes a group, so that a run without such a thread pays nothing.
        """
        if self.world.size == 1:
            return self.world
        return replace(self.world, group=dist.new_group(backend="gloo", timeout=timeout))

    def close(self) -> None:
        """Waits for all ranks and ends the process group. Without the wait gloo can abort a peer that is still busy."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _start(device: torch.device, timeout: timedelta) -> torch.device:
    """Binds this process to its device and makes sure that a default process group runs."""
    environment = launch_environment()
    if device.type == "cuda":
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if environment.is_launched:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def _axis(
    layout: ParallelLayout,
    here: Coordinate,
    everywhere: list[Coordinate],
    name: str,
    line_of: Callable[[Coordinate], Hashable],
    *,
    timeout: timedelta,
) -> Axis:
    """The ranks that agree with this one in `line_of`. Every process takes part in making the group of every line.

    A line of one rank has no group.
    """
    lines: dict[Hashable, list[int]] = {}
    for other in everywhere:
        lines.setdefault(line_of(other), []).append(layout.rank(other))
    groups = {line: dist.new_group(ranks, timeout=timeout) for line, ranks in lines.items() if len(ranks) > 1}
    mine, rank = lines[line_of(here)], layout.rank(here)
    return Axis(name, len(mine), mine.index(rank), groups.get(line_of(here)), tuple(mine))


def _pipeline_end(layout: ParallelLayout, coordinate: Coordinate) -> Hashable:
    """Alike for the first and the last pipeline rank of one (dp, tp) column, and for no other ranks."""
    is_end = coordinate.pp in (0, layout.pp - 1)
    return (coordinate.dp, coordinate.tp) if is_end else coordinate


def _data_mesh(dp: Axis, device: torch.device, timeout: timedelta) -> DeviceMesh:
    """FSDP wants a mesh also where the data axis has one rank; then it is over a group of this process alone."""
    group = dp.group
    if group is None:
        group = dist.new_group(list(dp.global_ranks), timeout=timeout, use_local_synchronization=True)
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=("dp",))
