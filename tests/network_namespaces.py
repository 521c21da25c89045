"""Two hosts on one machine: network namespaces that see each other through a veth pair and nothing else.

Everything but the network is shared, as on a cluster with a shared file system. Needs root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rank_process import REPOSITORY

INTERFACE = "veth0"
# From the range that is reserved for benchmarks (RFC 2544): it is nobody's, and exists inside the namespaces only.
ADDRESSES = ("198.18.0.1", "198.18.0.2")
PREFIX_LENGTH = 30

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@dataclass(frozen=True)
class Host:
    """One namespace with one interface."""

    namespace: str
    address: str

    def start(self, command: Sequence[str | Path], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Starts `command` from the repository's root, both its streams going to `log`."""
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *map(str, command)],
                cwd=REPOSITORY,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )


def why_not() -> str | None:
    """Why this machine cannot have two hosts; None if it can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if shutil.which("ip") is None:
        return "making network namespaces needs the command ip: install iproute2"
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    linked = _try_to_link(probe)
    _ip("netns", "delete", probe)
    return linked


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other at `Host.address`. Their processes end and they vanish with the context."""
    names = [f"host{number}-{os.getpid()}" for number in range(2)]
    made: list[str] = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        # Made inside the namespaces: the machine's own network never sees the pair.
        _ip("-n", names[0], "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/{PREFIX_LENGTH}", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _ip("-n", name, "link", "set", interface, "up")
        yield Host(names[0], ADDRESSES[0]), Host(names[1], ADDRESSES[1])
    finally:
        for name in made:
            _end_processes(name)
            _ip("netns", "delete", name)  # the pair goes with its namespaces


def torchrun_on_two_hosts(
    hosts: tuple[Host, Host],
    script_args: Sequence[str | Path],
    folder: Path,
    *,
    nproc_per_node: int,
    timeout_s: float,
) -> list[tuple[int, str]]:
    """What docs/guide/multi_node.md tells to type on each host; the exit status and the output of both.

    Raises TimeoutError with both outputs when they do not end in time.
    """
    logs = [folder / f"host{number}.log" for number in range(len(hosts))]
    running = []
    for number, host in enumerate(hosts):
        command = [
            *TORCHRUN,
            *("--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", str(nproc_per_node)),
            *("--master_addr", hosts[0].address, "--master_port", "29500"),
            *script_args,
        ]
        running.append(host.start(command, {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}, logs[number]))
    deadline = time.monotonic() + timeout_s
    try:
        statuses = [process.wait(max(0.0, deadline - time.monotonic())) for process in running]
    except subprocess.TimeoutExpired:
        outputs = "\n".join(f"--- {log.stem}\n{log.read_text()}" for log in logs)
        raise TimeoutError(f"not finished within {timeout_s} s\n{outputs}") from None
    return [(status, log.read_text()) for status, log in zip(statuses, logs, strict=True)]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _try_to_link(namespace: str) -> str | None:
    link = ["ip", "-n", namespace, "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]
    made = subprocess.run(link, capture_output=True, text=True)
    return f"this machine makes no veth pairs: {made.stderr.strip()}" if made.returncode else None


def _end_processes(namespace: str) -> None:
    """Kills what still runs in the namespace: it was started there by `Host.start`, or by what that started."""
    for pid in map(int, _ip("netns", "pids", namespace).split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
