"""The test harness itself: what a rank finds, what a failure shows, how fast four ranks start."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed import RankFailure, run_distributed, run_torchrun


@dataclass(frozen=True)
class Pair:
    left: int
    right: torch.Tensor


def rank_and_sum(pair: Pair, *, factor: int) -> tuple[int, Pair]:
    total = torch.tensor(float(dist.get_rank() + pair.left))
    dist.all_reduce(total)
    return dist.get_rank(), Pair(pair.left, total * factor + pair.right)


def thread_and_cuda_state() -> tuple[int, bool, bool, int]:
    """Of the forkserver, which is this rank's parent: its thread count, and whether it had initialised CUDA."""
    server_threads = len(os.listdir(f"/proc/{os.getppid()}/task"))
    return server_threads, torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork(), torch.get_num_threads()


def entry_time() -> float:
    return time.monotonic()


def imported_at_entry() -> set[str]:
    return set(sys.modules)


def environment_of_rank() -> tuple[str, ...]:
    return tuple(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))


def fail_on(failing_rank: int) -> None:
    if dist.get_rank() == failing_rank:
        raise ValueError(f"rank {failing_rank} is the culprit")
    dist.all_reduce(torch.ones(1))


def receive_what_nobody_sends() -> None:
    if dist.get_rank() == 1:
        dist.recv(torch.empty(1), src=0)


def die_silently() -> None:
    if dist.get_rank() == 1:
        os._exit(17)
    dist.all_reduce(torch.ones(1))


def test_arguments_and_values_travel_in_rank_order_and_the_group_is_formed() -> None:
    results = run_distributed(rank_and_sum, 3, Pair(10, torch.tensor([0.5])), factor=2)
    assert [rank for rank, _ in results] == [0, 1, 2]
    # (10 + 11 + 12) * 2 + 0.5
    assert all(pair.left == 10 and pair.right.tolist() == [66.5] for _, pair in results)


def test_every_rank_sees_the_variables_torchrun_would_set() -> None:
    assert run_distributed(environment_of_rank, 2) == [("0", "0", "2", "2"), ("1", "1", "2", "2")]


def test_an_error_in_one_rank_is_reported_first_and_by_its_own_traceback() -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(fail_on, 2, 1)
    message = str(failure.value)
    assert "--- rank 1 failed first" in message
    assert "ValueError: rank 1 is the culprit" in message
    assert message.index("rank 1 failed first") < message.index("rank 0")


def test_a_hanging_rank_is_killed_and_shows_where_it_hangs() -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(receive_what_nobody_sends, 2, timeout_s=3.0)
    assert "in receive_what_nobody_sends" in str(failure.value)


def test_a_rank_that_dies_without_a_word_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 .*\n.*exit code 17"):
        run_distributed(die_silently, 2)


def test_a_function_that_cannot_be_sent_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="top level of its module"):
        run_distributed(lambda: None, 1)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the server's threads through /proc")
def test_the_server_that_forks_ranks_has_one_thread_and_no_cuda() -> None:
    ((server_threads, cuda_initialized, cuda_was_initialized_before_fork, rank_threads),) = run_distributed(
        thread_and_cuda_state, 1
    )
    assert server_threads == 1
    assert not cuda_initialized and not cuda_was_initialized_before_fork
    assert rank_threads == 1


def test_ranks_start_with_torch_and_megatron_imported() -> None:
    (modules,) = run_distributed(imported_at_entry, 1)
    assert {"torch", "torch.distributed.fsdp", "megatron.errors"} <= modules


def test_starting_four_ranks_is_measured(record_property: Callable[[str, object], None]) -> None:
    run_distributed(entry_time, 4)  # the server is warm from here on
    seconds = []
    for _ in range(7):
        start = time.monotonic()
        seconds.append(max(run_distributed(entry_time, 4)) - start)
    record_property("measured", f"four ranks inside the test function after {statistics.median(seconds):.2f} s")


def test_a_script_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "hello.py"
    script.write_text("import os, sys; print('rank', os.environ['RANK'], sys.argv[1:]); sys.exit(0)\n")
    run = run_torchrun([script, "--flag"], nproc=2)
    assert run.returncode == 0, run.stdout
    assert "rank 0 ['--flag']" in run.stdout and "rank 1 ['--flag']" in run.stdout


def test_torchrun_past_its_time_limit_is_killed_with_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text("import os, time; print('worker', os.getpid(), flush=True); time.sleep(600)\n")
    with pytest.raises(RankFailure, match="did not finish within 8") as failure:
        run_torchrun([script], nproc=1, timeout_s=8.0)
    worker = int(str(failure.value).split("worker ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
