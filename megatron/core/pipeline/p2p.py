"""Sends and receives between neighbours on the pipeline axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.topology import Axis


@dataclass(frozen=True)
class Wire:
    """What travels between stages in one run: hidden states of one type, and their gradients.

    `shapes` has that of each micro-batch: every stage knows them, so that they need not travel.
    """

    axis: Axis
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    def send(self, tensor: Tensor, peer: int) -> dist.Work:
        """Starts sending to pipeline rank `peer`. The tensor must live until the work is done."""
        work = dist.isend(tensor, self.axis.global_ranks[peer], group=self.axis.group)
        assert work is not None
        return work

    def receive(self, peer: int, microbatch: int) -> tuple[Tensor, dist.Work]:
        """Posts a receive from pipeline rank `peer`; wait on the work before reading the tensor."""
        tensor = torch.empty(self.shapes[microbatch], dtype=self.dtype, device=self.device)
        work = dist.irecv(tensor, self.axis.global_ranks[peer], group=self.axis.group)
        assert work is not None
        return tensor, work
