"""Killed at any moment of saving, a run finds a complete checkpoint and goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint_samples import CONFIG
from distributed import RankFailure, run_distributed
from finetune_runs import (
    Ending,
    assert_same_bits,
    command,
    finetune_succeeds,
    run_in_turn,
    stored_entries,
    write_tokens,
)
from megatron.checkpoint import CheckpointInfo, LocalTensor, RunState, load, manager, open_checkpoint, open_source, save
from megatron.checkpoint.locate import list_iterations
from megatron.checkpoint.ownership import owned
from megatron.checkpoint.retention import Retention
from megatron.checkpoint.snapshot import HostBuffers
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Region
from megatron.core.topology import Topology
from megatron.training.saving import Saver

ROWS, COLUMNS = 64, 32


def train_one_step(state: torch.Tensor, iteration: int) -> None:
    """Depends on every step before it, and on nothing else."""
    state.mul_(1.7).add_(iteration * 0.3).fmod_(5.0)


def state_at(iteration: int) -> torch.Tensor:
    state = torch.arange(float(ROWS * COLUMNS)).reshape(ROWS, COLUMNS)
    for number in range(1, iteration + 1):
        train_one_step(state, number)
    return state


def kill_after(delay_s: float) -> None:
    """Another process kills this one, wherever it then is."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(delay_s)
        os.kill(victim, signal.SIGKILL)
        os._exit(0)


def save_until_killed(root: str, in_background: bool, victim: int, delay_s: float) -> None:
    """A run that does nothing but save: from the newest checkpoint of `root`, which must be right, on and on."""
    topology = Topology.create(ParallelLayout(dp=dist.get_world_size()))
    world, rows = topology.world, ROWS // dist.get_world_size()
    mine = slice(world.rank * rows, (world.rank + 1) * rows)
    tensor = torch.zeros(rows, COLUMNS)
    regions = [Region("w", (ROWS, COLUMNS), (mine.start, 0), (rows, COLUMNS), (0, 0))]
    held = [LocalTensor(kind, regions, tensor) for kind in ("model", "optimizer.exp_avg")]
    iteration, loaded = 0, None
    if list_iterations(Path(root)):
        source = open_checkpoint(Path(root), world)
        load(source, held, world)
        iteration, loaded = source.state().iteration, source.path
    else:
        tensor.copy_(state_at(0)[mine])
    assert torch.equal(tensor, state_at(iteration)[mine]), f"iteration {iteration} is not what was saved"
    axis = topology.second_world() if in_background else world
    saver = Saver(
        lambda info, tensors: save(
            Path(root), info, tensors, axis, tile_bytes=512, is_owned=True, retention=Retention(2, loaded)
        ),
        HostBuffers(held) if in_background else None,
    )
    with ExitStack() as stack:
        if world.is_first:
            stack.enter_context(owned(Path(root)))
        if loaded is None:  # something to lose
            saver.save(CheckpointInfo(RunState(iteration), CONFIG), held)
            saver.finish()
        if world.rank == victim:
            kill_after(delay_s)
        while True:
            iteration += 1
            train_one_step(tensor, iteration)
            saver.finish()
            saver.save(CheckpointInfo(RunState(iteration), CONFIG), held)


@pytest.mark.parametrize(
    ("in_background", "world_size", "num_kills"),
    [(False, 1, 8), (True, 1, 8), (False, 2, 7), (True, 2, 7)],
    ids=["waiting, one process", "background, one process", "waiting, two", "background, two"],
)
def test_a_kill_at_a_random_moment_of_saving_loses_nothing_that_was_saved(
    tmp_path: Path, in_background: bool, world_size: int, num_kills: int
) -> None:
    moments = random.Random(world_size + in_background)
    reached = 0
    for _ in range(num_kills):
        victim, delay_s = moments.randrange(world_size), moments.uniform(0.0, 0.15)
        with pytest.raises(RankFailure, match="died with exit code -9") as failure:
            run_distributed(save_until_killed, world_size, str(tmp_path), in_background, victim, delay_s)
        assert "AssertionError" not in str(failure.value)
        assert list_iterations(tmp_path)[-1] >= reached
        reached = list_iterations(tmp_path)[-1]
    # Two are kept, beside the one that the last run started from, and what a kill left of a removal is hidden.
    assert len(list_iterations(tmp_path)) <= 4
    entries = stored_entries(tmp_path)
    assert all(torch.equal(tensor, state_at(newest(tmp_path))) for tensor in entries.values()) and len(entries) == 2


def newest(root: Path) -> int:
    state = open_source(root).state()
    assert state is not None
    return state.iteration


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def finetune_and_die(argv: list[str], deadly_file: int) -> list[Ending]:
    """On a rank: the second process is killed when it has written that many files, before anybody hears of it."""
    num_files, write_file = 0, manager.write_file

    def write_and_die(path: Path, *args, **kwargs):
        nonlocal num_files
        written = write_file(path, *args, **kwargs)
        num_files += 1
        if dist.get_rank() == 1 and num_files == deadly_file:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    manager.write_file = write_and_die
    return run_in_turn([argv])


@pytest.mark.parametrize("how", ["waiting", "background"])
def test_a_run_whose_process_is_killed_while_saving_goes_on_bit_for_bit(data, tmp_path, how):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = {"train_iters": 8, "save_interval": 2, "eval_iters": 0, "zero_stage": 1}
    saving = {**flags, "keep_last": 2, "async_save": None if how == "background" else False}
    with pytest.raises(RankFailure, match="died with exit code -9"):
        run_distributed(finetune_and_die, 2, command(data, save=parts, **saving), 3)
    assert list_iterations(parts) == [2, 4]
    finetune_succeeds(2, command(data, save=whole, **flags), command(data, save=parts, load=parts, **saving))
    assert list_iterations(parts) == [4, 6, 8] and not list(parts.glob(".tmp-*"))
    assert_same_bits(stored_entries(parts), stored_entries(whole))
