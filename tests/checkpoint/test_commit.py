"""A checkpoint appears whole or not at all, whatever fails on the way."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint_samples import CONFIG, INFO, save_from_one_process
from megatron.checkpoint import commit as commit_module
from megatron.checkpoint.commit import check_save_folder, commit
from megatron.checkpoint.locate import TRACKER_FILE, find_checkpoint, list_iterations, replaced_folder
from megatron.checkpoint.manager import save
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.source import CheckpointInfo, LocalTensor
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Region
from megatron.core.topology import Axis
from megatron.errors import CheckpointError

WORLD = Axis("world")


def at(iteration: int, seed: int = 7) -> CheckpointInfo:
    return dataclasses.replace(INFO, state=dataclasses.replace(INFO.state, iteration=iteration, seed=seed))


def tensor_of(rows: slice, *, num_rows: int = 8, copy: int = 0, name: str = "w") -> LocalTensor:
    """Some rows of an entry of `num_rows` rows of 4."""
    tensor = torch.arange(num_rows * 4.0).reshape(num_rows, 4)[rows]
    return LocalTensor(
        "model", [Region(name, (num_rows, 4), (rows.start, 0), tuple(tensor.shape), (0, 0), copy)], tensor
    )


def names_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {".lock"}


def test_the_tracker_follows_and_earlier_iterations_stay(tmp_path: Path) -> None:
    for iteration in (10, 20):
        save_from_one_process(tmp_path, ParallelLayout(), info=at(iteration))
    assert (tmp_path / TRACKER_FILE).read_text() == "20"
    assert names_in(tmp_path) == {TRACKER_FILE, "iter_0000010", "iter_0000020"}
    assert find_checkpoint(tmp_path, 10).name == "iter_0000010"


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = save_from_one_process(tmp_path, ParallelLayout(), info=at(10, seed))
        state = NativeSource(folder).state()
        assert state is not None and state.seed == seed
    assert names_in(tmp_path) == {TRACKER_FILE, "iter_0000010"}


@pytest.mark.parametrize("kind", ["tree of another program", "file"])
def test_what_another_program_made_is_not_replaced(tmp_path: Path, kind: str) -> None:
    final = foreign = tmp_path / "iter_0000010"
    if kind != "file":
        foreign = final / "mp_rank_00" / "model_optim_rng.pt"
        foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"iter_0000010 exists and is no checkpoint of this program.*; move it"):
        save_from_one_process(tmp_path, ParallelLayout(), info=at(10))
    assert names_in(tmp_path) == {"iter_0000010"} and foreign.read_bytes() == b"weights"


@pytest.mark.parametrize("left", [(), ("rank_00000.safetensors",)], ids=str)
def test_what_is_left_of_a_lost_checkpoint_is_replaced(tmp_path: Path, left: tuple[str, ...]) -> None:
    """A run that fell back behind it comes to its iteration again, and must get past it."""
    folder = save_from_one_process(tmp_path, ParallelLayout(), info=at(10))
    for file in folder.iterdir():
        if file.name not in left:
            file.unlink()
    assert NativeSource(save_from_one_process(tmp_path, ParallelLayout(), info=at(10))).names()


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    """The old version lies aside, the new one is still hidden: the old one is found, and the next save puts it back."""
    folder = save_from_one_process(tmp_path, ParallelLayout(), info=at(10))
    folder.rename(replaced_folder(folder))
    (tmp_path / ".tmp-new").mkdir()
    assert find_checkpoint(tmp_path) == replaced_folder(folder)
    save_from_one_process(tmp_path, ParallelLayout(), info=at(20))
    assert names_in(tmp_path) == {TRACKER_FILE, "iter_0000010", "iter_0000020"}


def test_leftovers_of_crashed_saves_are_swept_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".tmp-dead").mkdir()
    (tmp_path / ".tmp-dead" / "rank_00000.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-tracker-dead").write_text("1")
    folder = save_from_one_process(tmp_path, ParallelLayout(), info=at(10))
    folder.rename(replaced_folder(folder))
    save_from_one_process(tmp_path, ParallelLayout(), info=at(10))
    assert names_in(tmp_path) == {TRACKER_FILE, "iter_0000010"}


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    save_from_one_process(tmp_path, ParallelLayout(), info=at(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: File too large \(0\.000 GiB needed\)"):
            save_from_one_process(tmp_path, ParallelLayout(), info=at(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == {TRACKER_FILE, "iter_0000010"}
    assert (tmp_path / TRACKER_FILE).read_text() == "10"


@pytest.mark.parametrize("failing", ["rename", "replace", "fsync"])
def test_whatever_fails_while_publishing_the_last_checkpoint_stays_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save_from_one_process(tmp_path, ParallelLayout(), info=at(10))

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error", "disk")

    with monkeypatch.context() as patched:
        patched.setattr(*((os, failing) if failing == "fsync" else (Path, failing)), fail)
        # The tracker is what is replaced, when the checkpoint is complete: then it alone is named.
        expected = r"latest_\S+ cannot be written" if failing == "replace" else "disk: Input/output error"
        with pytest.raises(CheckpointError, match=expected):
            save_from_one_process(tmp_path, ParallelLayout(), info=at(20))
    assert find_checkpoint(tmp_path).name == "iter_0000010"
    save_from_one_process(tmp_path, ParallelLayout(), info=at(30))
    assert find_checkpoint(tmp_path).name == "iter_0000030"
    assert not [name for name in names_in(tmp_path) if name.startswith(".tmp-")]


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"can be written to .*file/run \(Not a directory\); choose"):
        check_save_folder(tmp_path / "file" / "run")
    check_save_folder(tmp_path / "new" / "run")
    assert names_in(tmp_path / "new" / "run") == set()


def test_a_checkpoint_that_does_not_fit_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, at(10), [tensor_of(slice(0, 8))], WORLD)
    free = SimpleNamespace(free=127)
    monkeypatch.setattr(shutil, "disk_usage", lambda root: free)
    monkeypatch.setattr(commit_module, "_GIB", 1)
    with pytest.raises(CheckpointError, match=r"has 127\.000 GiB free, and a checkpoint needs 128\.000 GiB; free some"):
        save(tmp_path, at(20), [tensor_of(slice(0, 8))], WORLD)
    assert names_in(tmp_path) == {TRACKER_FILE, "iter_0000010"}
    free.free = 128
    save(tmp_path, at(20), [tensor_of(slice(0, 8))], WORLD)


def test_a_disk_that_fills_up_at_the_last_moment_leaves_a_complete_iteration_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, at(10), [tensor_of(slice(0, 8))], WORLD)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(
        CheckpointError, match=r"iteration 20 is complete, but .*\(No space left on device\); free some"
    ):
        save(tmp_path, at(20), [tensor_of(slice(0, 8))], WORLD)
    assert names_in(tmp_path) == {TRACKER_FILE, "iter_0000010", "iter_0000020"}


def test_rows_that_nobody_hands_in_are_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.w of iteration 10 .*: 8 of its 32 elements are in no piece"):
        save(tmp_path, INFO, [tensor_of(slice(0, 6))], WORLD)
    assert list_iterations(tmp_path) == []


def test_rows_that_are_handed_in_twice_are_found(tmp_path: Path) -> None:
    held = [tensor_of(slice(0, 6)), tensor_of(slice(5, 8))]
    with pytest.raises(CheckpointError, match=r"the pieces \[0:6, 0:4\] and \[5:8, 0:4\] overlap"):
        save(tmp_path, INFO, held, WORLD)


def test_an_entry_of_which_there_are_only_copies_is_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no rank wrote model\.u"):
        save(tmp_path, INFO, [tensor_of(slice(0, 8)), tensor_of(slice(0, 8), copy=1, name="u")], WORLD)


def test_ranks_that_disagree_about_an_entry_are_found(tmp_path: Path) -> None:
    other = tensor_of(slice(8, 9), num_rows=9)
    with pytest.raises(CheckpointError, match=r"model\.w is torch\.float32 \[8, 4\] on one rank and .* \[9, 4\]"):
        save(tmp_path, INFO, [tensor_of(slice(0, 8)), other], WORLD)


def test_our_own_bug_keeps_its_type(tmp_path: Path) -> None:
    def buggy(folder: Path) -> list:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        commit(tmp_path, INFO, buggy, WORLD, expected=())
    assert INFO.model is CONFIG
    assert names_in(tmp_path) == set()
