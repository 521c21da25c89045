"""A snapshot holds the values of its moment, in memory of its own that every save uses again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed import run_distributed
from megatron.checkpoint import snapshot
from megatron.checkpoint.background import BackgroundWork
from megatron.checkpoint.snapshot import HostBuffers, available_host_bytes, check_host_memory, snapshot_bytes
from megatron.checkpoint.source import LocalTensor
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Region
from megatron.core.topology import Axis, Topology
from megatron.errors import CheckpointError


def held(tensor: torch.Tensor, copy: int = 0) -> LocalTensor:
    shape = tuple(tensor.shape)
    return LocalTensor("model", [Region("w", shape, (0,) * len(shape), shape, (0,) * len(shape), copy)], tensor)


def test_a_copy_keeps_the_values_of_its_moment_and_the_next_one_takes_the_same_memory() -> None:
    live = torch.arange(12.0).reshape(3, 4)
    strided, half = torch.arange(20.0).reshape(4, 5)[:, 1:3], torch.ones(3, dtype=torch.bfloat16)
    tensors = [held(live), held(strided), held(half)]
    buffers = HostBuffers(tensors)
    first = buffers.copy(tensors)
    expected = [local.tensor.clone() for local in tensors]
    for local in tensors:
        local.tensor.add_(1)
    assert all(torch.equal(copy.tensor, value) for copy, value in zip(first, expected, strict=True))
    assert [copy.regions for copy in first] == [local.regions for local in tensors]
    second = buffers.copy(tensors)
    assert [copy.tensor.data_ptr() for copy in second] == [copy.tensor.data_ptr() for copy in first]
    assert all(torch.equal(copy.tensor, local.tensor) for copy, local in zip(second, tensors, strict=True))


def test_what_another_rank_writes_is_not_copied() -> None:
    written, other = held(torch.zeros(8)), held(torch.zeros(1000), copy=1)
    assert snapshot_bytes([written, other]) == 32
    first, second = HostBuffers([written, other]).copy([written, other])
    assert first.tensor is not written.tensor and second is other


def test_a_host_that_cannot_hold_the_copies_is_an_error_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [held(torch.zeros(2**20))]
    monkeypatch.setattr(snapshot, "available_host_bytes", lambda: 2**21)
    with pytest.raises(CheckpointError) as error:
        check_host_memory(tensors, Axis("world"))
    assert str(error.value) == (
        "--async_save needs 0.004 GiB of host memory for the copies of 1 processes, and 0.002 GiB are available; "
        "drop --async_save, or use fewer processes on a host."
    )
    for enough in (2**22, None):
        monkeypatch.setattr(snapshot, "available_host_bytes", lambda enough=enough: enough)
        check_host_memory(tensors, Axis("world"))


def message_of_the_check(available: int) -> str:
    snapshot.available_host_bytes = lambda: available
    world = Topology.create(ParallelLayout(dp=2)).world
    try:
        check_host_memory([held(torch.zeros(2**20))] * (1 + world.rank), world)
    except CheckpointError as error:
        return str(error)
    return "fits"


def test_the_processes_of_one_host_share_its_memory() -> None:
    need = 3 * 2**22  # one rank holds one tensor, the other two
    assert run_distributed(message_of_the_check, 2, need) == ["fits"] * 2
    assert all("0.012 GiB of host memory for the copies of 2 processes" in m for m in run_distributed(
        message_of_the_check, 2, need - 1
    ))  # fmt: skip


def test_the_memory_of_a_container_counts_where_it_is_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, limit, use = (tmp_path / name for name in ("meminfo", "max", "current"))
    monkeypatch.setattr(snapshot, "_MEMORY_FILE", memory)
    monkeypatch.setattr(snapshot, "_CONTAINER_FILES", (limit, use))
    assert available_host_bytes() is None
    memory.write_text("MemTotal:       32 kB\nMemAvailable:    8 kB\n")
    assert available_host_bytes() == 8192
    limit.write_text("max\n")
    use.write_text("1000\n")
    assert available_host_bytes() == 8192
    limit.write_text("5000\n")
    assert available_host_bytes() == 4000


def test_background_work_reports_once_and_to_who_waits() -> None:
    work: BackgroundWork[int] = BackgroundWork("test")
    assert work.wait() is None and not work.is_done
    work.start(lambda: 7)
    assert work.wait() == 7 and work.wait() is None
    work.start(lambda: 1 // 0)
    while not work.is_done:
        pass
    assert work.has_failed
    with pytest.raises(ZeroDivisionError):
        work.wait()
    assert not work.has_failed and not work.is_done


def groups_of_two_threads() -> tuple[bool, int]:
    topology = Topology.create(ParallelLayout(dp=2))
    second = topology.second_world()
    return second.group is not topology.world.group, second.rank


def test_the_second_world_has_a_group_of_its_own_and_one_process_needs_none() -> None:
    assert run_distributed(groups_of_two_threads, 2) == [(True, 0), (True, 1)]
    topology = Topology.serial()
    assert topology.second_world() is topology.world
