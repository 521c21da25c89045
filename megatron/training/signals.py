"""SIGTERM asks a run to save and leave; all ranks agree on it between two steps.

torchrun passes SIGTERM on to its workers and kills them 30 s later. A save that takes longer than what the current
step leaves of them is lost as a whole: the checkpoint before it stays the latest.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from megatron.core.collectives import all_reduce
from megatron.core.topology import Topology


class StopRequest:
    """Whether this process was asked to stop, and, since the ranks last agreed on it, whether any of them was."""

    def __init__(self, topology: Topology):
        self._topology = topology
        self._requested = False
        self.is_agreed = False

    def request(self, signal_number: int = 0, frame: FrameType | None = None) -> None:
        self._requested = True

    def agree(self) -> bool:
        """Every rank calls it together. True once any process was asked to stop."""
        flag = torch.tensor(float(self._requested), device=self._topology.device)
        self.is_agreed = bool(all_reduce(flag, self._topology.world, "max") > 0)
        return self.is_agreed


@contextmanager
def stop_on_sigterm(topology: Topology) -> Iterator[StopRequest]:
    """While inside, SIGTERM is a request and not an end; the former handler comes back after."""
    stop = StopRequest(topology)
    former = signal.signal(signal.SIGTERM, stop.request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, former)
