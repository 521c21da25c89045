"""Old checkpoints go when enough newer valid ones are there, and the last valid one never goes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch

from checkpoint_samples import INFO, save_from_one_process
from megatron.checkpoint.locate import iteration_folder, list_iterations
from megatron.checkpoint.manager import save
from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.checkpoint.retention import Retention, remove_old
from megatron.checkpoint.source import LocalTensor
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Region
from megatron.core.topology import Axis
from megatron.errors import CheckpointError

WORLD = Axis("world")
TENSOR = LocalTensor("model", [Region("w", (4, 4), (0, 0), (4, 4), (0, 0))], torch.arange(16.0).reshape(4, 4))


def save_iteration(root: Path, iteration: int, retention: Retention | None = None) -> Path:
    info = dataclasses.replace(INFO, state=dataclasses.replace(INFO.state, iteration=iteration))
    return save(root, info, [TENSOR], WORLD, retention=retention)


def saved(root: Path, *iterations: int) -> Path:
    """Saves all of them without retention; returns the folder of the last."""
    return [save_iteration(root, iteration) for iteration in iterations][-1]


def damage(root: Path, iteration: int) -> None:
    path = iteration_folder(root, iteration) / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_as_many_as_asked_for_are_kept_the_new_one_included(tmp_path: Path, keep_last: int) -> None:
    for iteration in range(1, 7):
        save_iteration(tmp_path, iteration, Retention(keep_last))
        assert list_iterations(tmp_path) == list(range(max(1, iteration - keep_last + 1), iteration + 1))
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_damaged_checkpoint_does_not_count(tmp_path: Path) -> None:
    newest = saved(tmp_path, 1, 2, 3, 4, 5)
    damage(tmp_path, 4)
    (iteration_folder(tmp_path, 3) / MANIFEST_FILE).write_text("{}")
    assert remove_old(newest, Retention(2)) == [iteration_folder(tmp_path, 1)]
    assert list_iterations(tmp_path) == [2, 3, 4, 5]


def test_if_the_new_checkpoint_cannot_be_read_back_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)
    fsync = os.fsync

    def lossy(descriptor: int) -> None:
        """A disk that has lost the end of what was written by the time the folder is read again."""
        fsync(descriptor)
        for shard in tmp_path.glob("iter_0000003/*.safetensors"):
            os.truncate(shard, shard.stat().st_size - 1)

    monkeypatch.setattr(os, "fsync", lossy)
    with pytest.raises(CheckpointError, match=r"iter_0000003/rank_00000\.safetensors has .* it was cut off"):
        save_iteration(tmp_path, 3, Retention(1))
    assert list_iterations(tmp_path) == [1, 2, 3]


def test_the_checkpoint_that_the_run_started_from_stays(tmp_path: Path) -> None:
    newest = saved(tmp_path, 1, 2, 3, 4)
    other_spelling = tmp_path / "." / "iter_0000002" / ".." / "iter_0000002"
    remove_old(newest, Retention(1, loaded=other_spelling))
    assert list_iterations(tmp_path) == [2, 4]


def test_after_going_back_the_run_that_was_given_up_neither_counts_nor_goes(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, 40)
    save_iteration(tmp_path, 25, Retention(2))
    assert list_iterations(tmp_path) == [20, 25, 30, 40]


def test_folders_that_are_no_checkpoints_of_this_program_stay(tmp_path: Path) -> None:
    foreign = tmp_path / "iter_0000001" / "mp_rank_00"
    foreign.mkdir(parents=True)
    remove_old(saved(tmp_path, 2, 3), Retention(1))
    assert foreign.is_dir() and list_iterations(tmp_path) == [3]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newest = saved(tmp_path, 1, 2)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    assert remove_old(newest, Retention(1)) == []
    (warning,) = caplog.messages
    assert "iter_0000001 is an old checkpoint that cannot be removed (Permission denied); remove it by hand" in warning


def test_a_file_that_cannot_be_removed_is_a_warning_at_this_save_and_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 1)
    rmtree = shutil.rmtree

    def refuse(folder: Path, **options: bool) -> None:
        if "removed" not in folder.name:
            rmtree(folder, **options)
        elif not options.get("ignore_errors"):
            raise PermissionError(1, "Operation not permitted", str(folder / "x"))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for iteration in (2, 3):
        save_iteration(tmp_path, iteration, Retention(2))
    save_iteration(tmp_path, 4)
    assert list_iterations(tmp_path) == [2, 3, 4]
    first, second = caplog.messages
    assert ".tmp-removed-" in first and "cannot be removed (Operation not permitted); remove it by hand" in first
    assert "was left by an earlier save and cannot be removed (Operation not permitted); remove it by hand" in second


def test_a_checkpoint_of_another_version_neither_counts_nor_goes(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    path = iteration_folder(tmp_path, 2) / MANIFEST_FILE
    body = path.read_text().partition("\n")[2].replace('"format_version": 2', '"format_version": 3')
    path.write_text(f'{{"crc32": "{zlib.crc32(body.encode()):08x}",\n{body}')
    for iteration in (3, 4, 5):
        save_iteration(tmp_path, iteration, Retention(2))
    assert list_iterations(tmp_path) == [2, 4, 5]


def test_a_kill_while_removing_leaves_nothing_that_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = saved(tmp_path, 1, 2)

    def killed(folder: Path) -> None:
        (folder / "rank_00000.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_old(newest, Retention(1))
    assert list_iterations(tmp_path) == [2] and len(list(tmp_path.glob(".tmp-removed-*"))) == 1
    save_from_one_process(tmp_path, ParallelLayout())
    assert not list(tmp_path.glob(".tmp-*"))
