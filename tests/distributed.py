"""Runs a function on several ranks, and a script under torchrun, so that distributed tests are as cheap as others.

``run_distributed(fn, world_size)`` forks its ranks from one warm server process that has torch and megatron
imported: four ranks are inside ``fn`` with their group formed in a fraction of a second. ``fn`` finds the default
process group initialised (gloo, file store) and its value comes back to the test, one per rank.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

from rank_process import REPOSITORY, RankJob, run_rank, stack_file

Result = TypeVar("Result")

# After one rank failed its peers see their connections close; what they say is secondary, so they get little time.
GRACE_AFTER_FAILURE_S = 5.0


class RankFailure(AssertionError):
    """At least one rank raised, died or did not finish; the message holds every rank's traceback or stacks."""


def run_distributed(
    fn: Callable[..., Result],
    world_size: int,
    *args: object,
    timeout_s: float = 60.0,
    backend: Literal["gloo", "nccl"] = "gloo",
    **kwargs: object,
) -> list[Result]:
    """Calls ``fn(*args, **kwargs)`` on each of ``world_size`` ranks and returns their values in rank order.

    ``fn`` is a function at the top level of its module; arguments and values are pickled. Raises RankFailure with
    the tracebacks of all ranks, the first failure first, and after ``timeout_s`` with the stacks of those that hang.
    """
    if "." in fn.__qualname__:
        raise TypeError(f"{fn.__qualname__} cannot be sent to a rank; define it at the top level of its module")
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        jobs = [
            RankJob(
                rank=rank,
                world_size=world_size,
                backend=backend,
                timeout_s=timeout_s,
                scratch=scratch,
                module_name=fn.__module__,
                module_file=str(sys.modules[fn.__module__].__file__),
                function=fn.__name__,
                payload=pickle.dumps((args, kwargs)),
            )
            for rank in range(world_size)
        ]
        with _started(jobs, _spawn_context() if backend == "nccl" else _forkserver_context()) as ranks:
            _collect(ranks, time.monotonic() + timeout_s)
            if any(rank.failed for rank in ranks):
                raise RankFailure(_describe(fn.__qualname__, ranks, timeout_s, scratch))
            return [pickle.loads(rank.value) for rank in ranks]


def run_torchrun(
    script_args: Sequence[str | Path],
    nproc: int,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs ``torchrun --standalone --nproc_per_node nproc *script_args`` from the repository's root, as a user would.

    ``env`` is added to the present environment. Standard error is part of ``stdout``. A run past ``timeout_s`` is
    killed with all its workers and raises RankFailure with what it printed.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    process = subprocess.Popen(
        [*torchrun, *map(str, script_args)],
        cwd=REPOSITORY,
        env={**os.environ, **_rank_environment(), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on to its workers, which run in sessions of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_AFTER_FAILURE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise RankFailure(f"torchrun {script_args[0]} did not finish within {timeout_s} s\n{output}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


@dataclass
class _Rank:
    """The parent's view of one rank, filled in by ``_collect``."""

    number: int
    process: BaseProcess
    report: Connection
    value: bytes = b""
    returned: bool = False
    error: str | None = None
    failed_at: float = field(default=float("inf"))
    hangs: bool = False

    @property
    def failed(self) -> bool:
        return self.error is not None or self.hangs

    def receive(self) -> bool:
        """Takes one message; False when the rank has closed its end, that is, has exited."""
        try:
            kind, content = self.report.recv()
        except EOFError:
            self.process.join()
            if self.error is None and (not self.returned or self.process.exitcode != 0):
                self._fail(f"died with exit code {self.process.exitcode} and no traceback\n")
            return False
        if kind == "result":
            self.value, self.returned = content, True
        else:
            self._fail(content)
        return True

    def _fail(self, error: str) -> None:
        self.error, self.failed_at = error, time.monotonic()


@contextlib.contextmanager
def _started(jobs: Sequence[RankJob], context: BaseContext) -> Iterator[list[_Rank]]:
    ranks = []
    try:
        for job in jobs:
            report, sender = context.Pipe(duplex=False)
            process = context.Process(target=run_rank, args=(job, sender), daemon=True)  # type: ignore[attr-defined]
            process.start()
            sender.close()  # the rank holds the only writing end: its exit is the end of the file
            ranks.append(_Rank(job.rank, process, report))
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.report.close()


def _collect(ranks: Sequence[_Rank], deadline: float) -> None:
    """Receives from all ranks until each has exited, or the deadline has passed, or one failed a while ago."""
    running = {rank.report: rank for rank in ranks}
    while running:
        first_failure = min(rank.failed_at for rank in ranks)
        patience_s = min(deadline, first_failure + GRACE_AFTER_FAILURE_S) - time.monotonic()
        ready = wait(list(running), timeout=max(patience_s, 0.0))
        if not ready:
            break
        for connection in ready:
            if not running[connection].receive():  # type: ignore[index]
                del running[connection]  # type: ignore[arg-type]
    for rank in running.values():
        rank.hangs = rank.error is None


def _describe(name: str, ranks: Sequence[_Rank], timeout_s: float, scratch: str) -> str:
    """Every failed rank's traceback in the order in which they failed, then the stacks of those still running."""
    hanging = [rank for rank in ranks if rank.hangs]
    for rank in hanging:
        os.kill(rank.process.pid or 0, signal.SIGUSR1)
    if hanging:
        time.sleep(0.5)  # faulthandler writes the stacks
    failed = sorted((rank for rank in ranks if rank.error is not None), key=lambda rank: rank.failed_at)
    parts = [f"{name}: {len(failed)} of {len(ranks)} ranks failed, {len(hanging)} did not finish in {timeout_s} s"]
    for rank in failed:
        order = "failed first" if rank is failed[0] else "then failed"
        parts.append(f"--- rank {rank.number} {order}\n{rank.error}")
    for rank in hanging:
        where = "in the closing barrier" if rank.returned else "in the function"
        parts.append(f"--- rank {rank.number} was still {where}\n{stack_file(scratch, rank.number).read_text()}")
    return "\n".join(parts)


@cache
def _forkserver_context() -> BaseContext:
    """Starts the server on first use; it lives as long as this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    # Until Python 3.14 the server ignores the parent's sys.path and reads only its environment.
    paths = [str(REPOSITORY / "tests"), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    with _environment(PYTHONPATH=os.pathsep.join(paths), **_rank_environment()):
        forkserver.ensure_running()
    return context


def _spawn_context() -> BaseContext:
    return multiprocessing.get_context("spawn")


def _rank_environment() -> dict[str, str]:
    """One thread per rank, and gloo on the loopback interface where there is one, so that no name is looked up."""
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    if "lo" in (name for _, name in socket.if_nameindex()):
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before: dict[str, Any] = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
