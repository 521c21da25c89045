"""A process killed at any step of a save leaves the old checkpoint or the new one, and the next save tidies up."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_samples import INFO, save_from_one_process, whole_tensors
from distributed import RankFailure, run_distributed
from megatron.checkpoint import CheckpointInfo, open_source
from megatron.checkpoint.locate import list_iterations
from megatron.checkpoint.retention import Retention, remove_old
from megatron.core.layout import ParallelLayout

LAYOUT = ParallelLayout(tp=2)


def at(iteration: int, seed: int) -> CheckpointInfo:
    return dataclasses.replace(INFO, state=dataclasses.replace(INFO.state, iteration=iteration, seed=seed))


def save_and_die(root: str, iteration: int, deadly_step: int, keep_last: int | None = None) -> int:
    """Saves, and is killed in place of step `deadly_step`: a file or folder is made durable, or a name is changed.

    With `keep_last` it saves, and is killed while it removes old checkpoints, name by name. Returns how many steps.
    """
    steps = 0

    def counted(call: Callable) -> Callable:
        def step(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == deadly_step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return step

    if keep_last is None:
        os.fsync, Path.rename, Path.replace = counted(os.fsync), counted(Path.rename), counted(Path.replace)
    folder = save_from_one_process(Path(root), LAYOUT, info=at(iteration, seed=2))
    if keep_last is not None:
        os.fsync, Path.rename = counted(os.fsync), counted(Path.rename)
        os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
        remove_old(folder, Retention(keep_last))
    return steps


def assert_whole(root: Path) -> int:
    """Reads everything of the latest checkpoint, which must be complete and correct; returns the seed in it."""
    source, whole = open_source(root), whole_tensors()
    assert sorted(source.names()) == sorted(whole)
    for name, tensor in whole.items():
        assert torch.equal(source.read(name, (0,) * tensor.dim(), tensor.shape), tensor)
    state = source.state()
    assert state is not None and state.seed is not None
    return state.seed


@pytest.mark.parametrize("iteration", [10, 20], ids=["the same iteration again", "the next iteration"])
def test_a_kill_at_any_step_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path, iteration: int) -> None:
    save_from_one_process(tmp_path / "count", LAYOUT, info=at(10, seed=1))
    (num_steps,) = run_distributed(save_and_die, 1, str(tmp_path / "count"), iteration, 0)
    seeds = []
    for step in range(1, num_steps + 1):
        root = tmp_path / str(step)
        save_from_one_process(root, LAYOUT, info=at(10, seed=1))
        with pytest.raises(RankFailure, match="exit code -9"):
            run_distributed(save_and_die, 1, str(root), iteration, step)
        seeds.append(assert_whole(root))
        save_from_one_process(root, LAYOUT, info=at(30, seed=3))
        assert assert_whole(root) == 3
        assert set(list_iterations(root)) <= {10, 20, 30} and 10 in list_iterations(root)
        assert not [p for p in root.iterdir() if p.name.startswith(".tmp-") or p.name.endswith(".replaced")]
    # Both outcomes occur, and once the new one is in place it stays.
    assert seeds == sorted(seeds) and set(seeds) == {1, 2}


def test_a_kill_at_any_step_of_a_removal_leaves_no_half_of_a_checkpoint(tmp_path: Path) -> None:
    def prepare(root: Path) -> None:
        for iteration in (1, 2, 3):
            save_from_one_process(root, LAYOUT, info=at(iteration, seed=1))

    prepare(tmp_path / "count")
    (num_steps,) = run_distributed(save_and_die, 1, str(tmp_path / "count"), 4, 0, keep_last=2)
    assert list_iterations(tmp_path / "count") == [3, 4]
    for step in range(1, num_steps + 1):
        root = tmp_path / str(step)
        prepare(root)
        with pytest.raises(RankFailure, match="exit code -9"):
            run_distributed(save_and_die, 1, str(root), 4, step, keep_last=2)
        assert assert_whole(root) == 2
        assert list_iterations(root)[-2:] == [3, 4]
        for iteration in list_iterations(root):
            open_source(root, iteration)
        save_from_one_process(root, LAYOUT, info=at(5, seed=3))
        assert not list(root.glob(".tmp-*"))
