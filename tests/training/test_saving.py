"""Saving while training goes on is saving while it waits, bit for bit; its failures and the run's end meet in order."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from checkpoint_samples import INFO
from distributed import RankFailure, run_distributed
from finetune_runs import (
    GLOBAL_BATCH_SIZE,
    Ending,
    assert_same_bits,
    command,
    finetune_runs,
    finetune_succeeds,
    run_in_turn,
    stored_entries,
    write_tokens,
)
from megatron.checkpoint import manager
from megatron.checkpoint.locate import list_iterations
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.snapshot import HostBuffers, snapshot_bytes
from megatron.checkpoint.source import RunState
from megatron.core.topology import Topology
from megatron.data.loader import StepLoader
from megatron.training import checkpointing
from megatron.training.saving import Saver
from megatron.training.sinks import METRICS_FILE, read_metrics
from other_runs import another_process_owns

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "DP2 ZeRO-1": (2, {"zero_stage": 1}),
    "DP2 replicated": (2, {}),
    "TP2 bf16": (2, {"tensor_model_parallel_size": 2, "bf16": None}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def run_with_late_writer(argv: list[str], train_iters: int) -> list[Ending]:
    """On a rank: what is saved at iteration k is written when step k + 1 is done, if there is one."""
    steps_begun, changed = 0, threading.Condition()
    hand_out, write_file = StepLoader.__next__, manager.write_file

    def next_step(loader: StepLoader):
        nonlocal steps_begun
        with changed:
            steps_begun += 1
            changed.notify_all()
        return hand_out(loader)

    def write_late(path: Path, *args, **kwargs):
        written_at = steps_begun
        with changed:
            assert changed.wait_for(lambda: steps_begun >= min(written_at + 2, train_iters), timeout=30)
        return write_file(path, *args, **kwargs)

    StepLoader.__next__, manager.write_file = next_step, write_late  # type: ignore[method-assign]
    return run_in_turn([argv])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_snapshot_holds_the_values_before_the_updates_that_follow(layout, data, tmp_path):
    world_size, flags = LAYOUTS[layout]
    flags = {**flags, "train_iters": 8, "save_interval": 3, "eval_iters": 0}
    waiting, going_on = tmp_path / "waiting", tmp_path / "going_on"
    finetune_succeeds(world_size, command(data, save=waiting, **flags))
    argv = command(data, save=going_on, async_save=None, **flags)
    ((ending, *_), *_) = run_distributed(run_with_late_writer, world_size, argv, 8)
    assert ending.status == 0, ending.err
    assert list_iterations(going_on) == list_iterations(waiting) == [3, 6, 8]
    for iteration in (3, 6, 8):
        assert_same_bits(stored_entries(going_on, iteration), stored_entries(waiting, iteration))
        assert state_of(going_on, iteration) == state_of(waiting, iteration)
    lines = ending.out.splitlines()
    copied = [n for n, line in enumerate(lines) if line.startswith("copied the state of iteration 3 in ")]
    saved = [n for n, line in enumerate(lines) if line.startswith(f"saved {going_on}/iter_0000003 in ")]
    fourth = [n for n, line in enumerate(lines) if "iteration  4/8" in line]
    assert copied < fourth < saved
    assert lines[saved[0]].endswith(" s, while training went on")
    assert lines[-1].startswith(f"saved {going_on}/iter_0000008 in ")


def state_of(folder: Path, iteration: int) -> RunState:
    """All that is saved beside the tensors but the flags, which name the folder."""
    state = open_source(folder, iteration).state()
    assert state is not None
    return dataclasses.replace(state, config={})


def test_a_run_that_saves_in_the_background_is_resumed_like_any_other(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = {"train_iters": 8, "pipeline_model_parallel_size": 2, "save_interval": 2}
    finetune_succeeds(
        2,
        command(data, save=whole, **flags),
        command(data, save=parts, load=parts, async_save=None, keep_last=2, exit_interval=5, **flags),
        command(data, save=parts, load=parts, async_save=None, keep_last=2, **flags),
    )
    # The one that the second run started from stays beside the last two.
    assert list_iterations(parts) == [5, 6, 8]
    assert_same_bits(stored_entries(parts), stored_entries(whole))
    assert read_losses(parts) == read_losses(whole)


def read_losses(folder: Path) -> list[float | int | None]:
    return [line["lm_loss"] for line in read_metrics(folder / METRICS_FILE)]


def run_with_full_disk(argv: list[str], full_rank: int, after_files: int) -> list[Ending]:
    """On a rank: on `full_rank` there is room for `after_files` files."""
    num_files = 0
    reserve = os.posix_fallocate

    def reserve_while_there_is_room(*args: int) -> None:
        nonlocal num_files
        num_files += 1
        if dist.get_rank() == full_rank and num_files > after_files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*args)

    os.posix_fallocate = reserve_while_there_is_room
    return run_in_turn([argv])


def test_a_save_that_fails_in_the_background_ends_the_run_on_all_ranks_and_names_itself(data, tmp_path):
    argv = command(data, save=tmp_path, async_save=None, save_interval=4, train_iters=5000, eval_iters=0)
    (first,), (second,) = run_distributed(run_with_full_disk, 2, argv, 1, 1)
    assert (first.status, second.status) == (2, 2)
    assert first.err.splitlines()[-1].startswith(
        "CheckpointError: the save of iteration 8, which went on in the background, failed: rank 1: "
    )
    assert first.err.rstrip().endswith("rank_00001.safetensors: No space left on device (0.000 GiB needed)")
    assert list_iterations(tmp_path) == [4] and not list(tmp_path.glob(".tmp-*"))


def test_whatever_ends_a_save_in_the_background_its_iteration_is_named(caplog):
    def lose_peer(info, tensors) -> Path:
        raise RuntimeError("Connection closed by peer")

    saver = Saver(lose_peer, HostBuffers([]))
    saver.save(dataclasses.replace(INFO, state=RunState(iteration=7)), [])
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        saver.finish()
    assert caplog.messages == [
        "the save of iteration 7, which went on in the background, failed: RuntimeError: Connection closed by peer"
    ]


def test_a_save_that_fails_at_the_end_of_the_run_fails_the_run(data, tmp_path):
    argv = command(data, save=tmp_path, async_save=None, train_iters=2)
    endings = run_distributed(run_with_full_disk, 2, argv, 0, 0)
    assert [ending.status for (ending,) in endings] == [2, 2]
    assert "the save of iteration 2, which went on in the background, failed: rank 0: " in endings[0][0].err
    assert list_iterations(tmp_path) == []


def run_that_breaks(argv: list[str], at_samples: int) -> list[Ending]:
    """On a rank: the step after `at_samples` samples raises on rank 1 while the save before it is being written."""
    writing, broken = threading.Event(), threading.Event()
    hand_out, write_file = StepLoader.__next__, manager.write_file

    def next_step(loader: StepLoader):
        if dist.get_rank() == 1 and loader.consumed_samples == at_samples:
            assert writing.wait(30)
            broken.set()
            raise ValueError("our own bug")
        return hand_out(loader)

    def write_after_the_break(path: Path, *args, **kwargs):
        writing.set()
        assert dist.get_rank() != 1 or broken.wait(30)
        return write_file(path, *args, **kwargs)

    StepLoader.__next__, manager.write_file = next_step, write_after_the_break  # type: ignore[method-assign]
    return run_in_turn([argv])


def test_a_run_that_ends_with_an_error_completes_the_checkpoint_it_has_begun(data, tmp_path):
    argv = command(data, save=tmp_path, async_save=None, save_interval=3, eval_iters=0)
    with pytest.raises(RankFailure, match="ValueError: our own bug"):
        run_distributed(run_that_breaks, 2, argv, 3 * GLOBAL_BATCH_SIZE)
    assert list_iterations(tmp_path) == [3] and not list(tmp_path.glob(".tmp-*"))
    assert len(stored_entries(tmp_path)) > 0


def run_with_sigterm_while_writing(argv: list[str]) -> list[Ending]:
    """On a rank: the first write sends SIGTERM to the second process."""
    write_file = manager.write_file

    def write_and_stop(path: Path, *args, **kwargs):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return write_file(path, *args, **kwargs)

    manager.write_file = write_and_stop
    return run_in_turn([argv])


def test_sigterm_while_a_save_is_written_saves_once_more_and_leaves_with_both(data, tmp_path):
    argv = command(data, save=tmp_path, async_save=None, save_interval=3, train_iters=5000, eval_iters=0)
    endings = run_distributed(run_with_sigterm_while_writing, 2, argv)
    assert [ending.status for (ending,) in endings] == [0, 0]
    first, *_, last = list_iterations(tmp_path)
    assert first == 3 and f"SIGTERM at iteration {last}: leaving" in endings[0][0].out
    assert endings[0][0].out.splitlines()[-1].startswith(f"saved {tmp_path}/iter_{last:07d} in ")
    finetune_succeeds(2, command(data, save=tmp_path, load=tmp_path, train_iters=last + 1, eval_iters=0))


def groups_of_a_run(argv: list[str]) -> tuple[int, list[Ending]]:
    """On a rank: how many groups of their own a run asks for."""
    calls, second_world = 0, Topology.second_world

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return second_world(*args, **kwargs)

    Topology.second_world = counted  # type: ignore[method-assign]
    endings = run_in_turn([argv])
    return calls, endings


def test_only_a_run_that_saves_in_the_background_makes_a_group_for_it(data, tmp_path):
    for flags, expected in ((), 0), (("--async_save",), 1):
        argv = [*command(data, save=tmp_path / str(expected), train_iters=1, eval_iters=0), *flags]
        assert [calls for calls, _ in run_distributed(groups_of_a_run, 2, argv)] == [expected] * 2


def test_a_second_run_in_the_same_folder_is_refused_before_it_trains(data, tmp_path):
    argv = command(data, save=tmp_path, train_iters=1)
    with another_process_owns(tmp_path):
        (endings,) = finetune_runs(2, argv)
    assert [ending.status for ending in endings] == [2, 2]
    assert f"CheckpointError: rank 0: {tmp_path} belongs to process 4711 on node7, which saves" in endings[0].err
    assert "lm loss" not in endings[0].out and list_iterations(tmp_path) == []
    finetune_succeeds(2, argv)


def run_without_room(argv: list[str]) -> list[Ending]:
    shutil.disk_usage = lambda root: SimpleNamespace(free=1000)  # type: ignore[assignment,misc,return-value]
    return run_in_turn([argv])


def test_a_disk_without_room_for_a_checkpoint_is_told_before_training(data, tmp_path):
    (tmp_path / ".tmp-crashed").mkdir()
    ((ending,),) = run_distributed(run_without_room, 1, command(data, save=tmp_path, train_iters=1))
    assert ending.status == 2 and "lm loss" not in ending.out
    assert f"CheckpointError: {tmp_path} has 0.000 GiB free, and a checkpoint needs 0.000 GiB; free some" in ending.err
    assert not list(tmp_path.glob(".tmp-*"))


def bytes_of_the_copy(argv: list[str]) -> tuple[int, str]:
    """On a rank: what the copies really take, and what the run prints."""
    counted = 0
    check = checkpointing.check_host_memory

    def counting(tensors, world) -> None:
        nonlocal counted
        counted = snapshot_bytes(tensors)
        check(tensors, world)

    checkpointing.check_host_memory = counting
    (ending,) = run_in_turn([argv])
    assert ending.status == 0, ending.err
    return counted, ending.out


@pytest.mark.parametrize("flags", [{}, {"zero_stage": 2}, {"pipeline_model_parallel_size": 2, "no_save_optim": None}])
def test_the_summary_says_what_is_kept_and_what_the_copies_take(flags, data, tmp_path):
    argv = command(data, save=tmp_path, async_save=None, keep_last=2, save_interval=3, train_iters=1, **flags)
    (first, output), (second, _) = run_distributed(bytes_of_the_copy, 2, argv)
    assert (
        f"save       {tmp_path}, every 3 iterations and at the end, keeping the last 2, "
        f"from a copy of {max(first, second) / 2**20:.2f} MiB of host memory a process\n"
    ) in output
