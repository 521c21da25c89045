"""SIGTERM asks a run to save and leave; all ranks agree between two steps on this and other reasons to stop.

torchrun passes SIGTERM on to its workers and kills them 30 s later. A save that takes longer than what the current
step leaves of them is lost as a whole: the checkpoint before it stays the latest.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from megatron.core.collectives import all_reduce
from megatron.core.topology import Topology


class StopRequest:
    """Why the run has to stop, as the ranks last agreed: a process was asked to, or a save in the background failed.

    `has_save_failed` says so of this rank.
    """

    def __init__(self, topology: Topology, has_save_failed: Callable[[], bool]):
        self._topology = topology
        self._has_save_failed = has_save_failed
        self._requested = False
        self.is_agreed = False
        self.save_failed = False

    def request(self, signal_number: int = 0, frame: FrameType | None = None) -> None:
        self._requested = True

    def agree(self) -> bool:
        """Every rank calls it together. True once any process has a reason to stop."""
        flags = [float(self._requested), float(self._has_save_failed())]
        agreed = all_reduce(torch.tensor(flags, device=self._topology.device), self._topology.world, "max")
        self.is_agreed, self.save_failed = (flag > 0 for flag in agreed.tolist())
        return self.is_agreed or self.save_failed


@contextmanager
def stop_on_sigterm(topology: Topology, has_save_failed: Callable[[], bool]) -> Iterator[StopRequest]:
    """While inside, SIGTERM is a request and not an end; the former handler comes back after."""
    stop = StopRequest(topology, has_save_failed)
    former = signal.signal(signal.SIGTERM, stop.request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, former)
