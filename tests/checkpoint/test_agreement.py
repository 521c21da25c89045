"""Over real process groups: saves and loads succeed on all ranks or fail on all, with one message."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint_samples import INFO, blank_like, held_by, whole_tensors
from distributed import run_distributed
from megatron.checkpoint.agreement import gather_to_first, on_every_rank, on_first_rank
from megatron.checkpoint.locate import find_checkpoint, list_iterations
from megatron.checkpoint.manager import load, save
from megatron.checkpoint.opening import open_checkpoint
from megatron.core.layout import ParallelLayout
from megatron.core.topology import Axis
from megatron.errors import CheckpointError


def world() -> Axis:
    size = dist.get_world_size()
    return Axis("world", size, dist.get_rank(), dist.group.WORLD, tuple(range(size)))


def message_of_failing(ranks: list[int]) -> str:
    def action() -> None:
        if dist.get_rank() in ranks:
            raise CheckpointError(f"disk {dist.get_rank()} is full")

    try:
        on_every_rank(world(), action)
    except CheckpointError as error:
        return str(error)
    return "succeeded"


def first_rank_decides() -> tuple[str, list[int]]:
    value = on_first_rank(world(), lambda: f"chosen by {dist.get_rank()}")
    return value, gather_to_first(world(), dist.get_rank() * 10)


def save_and_load(root: str, saved: ParallelLayout, loaded: ParallelLayout, by_rows: bool) -> bool:
    """True if this rank of the second layout holds bitwise what it should."""
    axis = world()
    save(Path(root), INFO, held_by(saved, axis.rank, whole_tensors(), by_rows=by_rows), axis, tile_bytes=512)
    expected = held_by(loaded, axis.rank, whole_tensors(), by_rows=True)
    held = blank_like(expected)
    load(open_checkpoint(Path(root), axis), held, axis)
    return all(torch.equal(a.tensor, b.tensor) for a, b in zip(held, expected, strict=True))


def message_of_saving_with_full_disk_on(root: str, full_rank: int) -> str:
    axis = world()

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if axis.rank == full_rank:
        os.posix_fallocate = full
    try:
        save(Path(root), INFO, held_by(ParallelLayout(tp=2), axis.rank, whole_tensors(), by_rows=False), axis)
    except CheckpointError as error:
        return str(error)
    return "saved"


def message_of_loading(root: str) -> str:
    axis = world()
    held = blank_like(held_by(ParallelLayout(tp=2), axis.rank, whole_tensors(), by_rows=False))
    try:
        load(open_checkpoint(Path(root), axis), held, axis)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_failure_of_some_ranks_is_raised_by_all_with_their_numbers() -> None:
    assert run_distributed(message_of_failing, 3, [1]) == ["rank 1: disk 1 is full"] * 3
    assert run_distributed(message_of_failing, 3, [0, 2]) == ["rank 0: disk 0 is full | rank 2: disk 2 is full"] * 3
    assert run_distributed(message_of_failing, 3, []) == ["succeeded"] * 3


def test_the_first_rank_decides_for_all_and_alone_receives_the_values() -> None:
    assert run_distributed(first_rank_decides, 3) == [("chosen by 0", [0, 10, 20]), *[("chosen by 0", [])] * 2]


@pytest.mark.parametrize(
    ("saved", "loaded", "by_rows"),
    [
        (ParallelLayout(tp=2, pp=2), ParallelLayout(dp=4), False),
        (ParallelLayout(dp=4), ParallelLayout(tp=4), True),
        (ParallelLayout(dp=2, tp=2), ParallelLayout(pp=4), True),
        (ParallelLayout(dp=2, pp=2), ParallelLayout(dp=2, tp=2), False),
    ],
    ids=str,
)
def test_four_ranks_save_in_one_layout_and_load_in_another_bitwise(tmp_path: Path, saved, loaded, by_rows) -> None:
    assert run_distributed(save_and_load, 4, str(tmp_path), saved, loaded, by_rows) == [True] * 4
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_of_one_rank_fails_all_and_leaves_nothing(tmp_path: Path) -> None:
    messages = run_distributed(message_of_saving_with_full_disk_on, 2, str(tmp_path), 1)
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1: ") and "No space left on device" in messages[0]
    assert list_iterations(tmp_path) == [] and not list(tmp_path.glob(".tmp-*"))


def test_damage_that_one_rank_finds_stops_all_ranks(tmp_path: Path) -> None:
    assert run_distributed(message_of_saving_with_full_disk_on, 2, str(tmp_path), None) == ["saved"] * 2
    path = find_checkpoint(tmp_path) / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    messages = run_distributed(message_of_loading, 2, str(tmp_path))
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1: ") and "rank_00001.safetensors: the tile at rows" in messages[0]
