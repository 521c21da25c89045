"""Plain data parallelism: every data rank holds all weights, and gradients are summed in buckets.

A bucket is reduced as soon as the last backward pass has produced its gradients, while that pass goes
on with earlier layers. Buckets start in one fixed order on every rank, whatever order autograd finishes
them in, so that the ranks' collectives always match.

Where the stages compute in a lower precision than their parameters were built in, the built tensors
become the masters: the modules keep low-precision copies, and each micro-batch's gradient is added up in
the masters' precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.collectives import all_reduce_async
from megatron.core.topology import Axis


class Replication:
    """The engine behind ZeRO stage 0. `masters[i][j]` is what is updated for parameter j of stage i.

    On one data rank without a change of precision there is nothing to do, and no hook is installed.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[nn.Parameter]],
        axis: Axis,
        *,
        compute_dtype: torch.dtype | None,
        bucket_bytes: int,
    ):
        self._axis = axis
        self._is_last = [False] * len(parameters)
        self._replicas = [
            [_Replica(parameter, _master(parameter, compute_dtype)) for parameter in stage] for stage in parameters
        ]
        self._buckets = self._fill_buckets(bucket_bytes) if axis.size > 1 else []
        self._num_started = 0
        self._register_hooks()

    @property
    def masters(self) -> list[list[Tensor]]:
        return [[replica.master for replica in stage] for stage in self._replicas]

    def prepare_backward(self, stage_index: int, *, is_last: bool) -> None:
        self._is_last[stage_index] = is_last

    def finish_gradients(self) -> None:
        """Reduces what the backward passes have not, and waits for all of it."""
        self._start_buckets(len(self._buckets))
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.reset()
        self._num_started = 0

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts the masters into the parameters that the modules compute with."""
        copies = [replica for stage in self._replicas for replica in stage if replica.is_cast]
        if copies:
            torch._foreach_copy_([copy.parameter.data for copy in copies], [copy.master for copy in copies])

    def _fill_buckets(self, bucket_bytes: int) -> list[_Bucket]:
        """Buckets of gradients in the order in which backward passes make them: last stage and last layer first."""
        buckets: list[_Bucket] = []
        num_bytes = dtype = None
        for stage in reversed(self._replicas):
            for replica in reversed(stage):
                if not replica.parameter.requires_grad:
                    continue
                size = replica.master.numel() * replica.master.element_size()
                if num_bytes is None or num_bytes + size > bucket_bytes or replica.master.dtype != dtype:
                    buckets.append(_Bucket([]))
                    num_bytes, dtype = 0, replica.master.dtype
                buckets[-1].masters.append(replica.master)
                replica.bucket = buckets[-1]
                num_bytes += size
        for bucket in buckets:
            bucket.reset()
        return buckets

    def _register_hooks(self) -> None:
        for stage_index, stage in enumerate(self._replicas):
            for replica in stage:
                if replica.parameter.requires_grad and (replica.is_cast or replica.bucket is not None):
                    replica.parameter.register_post_accumulate_grad_hook(
                        partial(self._on_gradient, replica, stage_index)
                    )

    def _on_gradient(self, replica: _Replica, stage_index: int, parameter: Tensor) -> None:
        """Runs when one backward pass has added its whole gradient to `parameter`."""
        if replica.is_cast:
            replica.move_gradient()
        if replica.bucket is not None and self._is_last[stage_index]:
            replica.bucket.num_missing -= 1
            self._start_buckets(self._num_complete())

    def _num_complete(self) -> int:
        """How many buckets, counted in order from the first, have all their gradients."""
        complete = self._num_started
        while complete < len(self._buckets) and self._buckets[complete].num_missing == 0:
            complete += 1
        return complete

    def _start_buckets(self, end: int) -> None:
        for bucket in self._buckets[self._num_started : end]:
            bucket.start(self._axis)
        self._num_started = max(self._num_started, end)


@dataclass
class _Replica:
    """A module's parameter and its master; they are the same tensor where the precision is the same."""

    parameter: nn.Parameter
    master: Tensor
    bucket: _Bucket | None = None

    @property
    def is_cast(self) -> bool:
        return self.master is not self.parameter

    def move_gradient(self) -> None:
        gradient, self.parameter.grad = self.parameter.grad, None
        assert gradient is not None
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master.dtype)
        else:
            self.master.grad.add_(gradient)


@dataclass
class _Bucket:
    """Gradients that travel together. `num_missing` counts those that the last backward pass still owes."""

    masters: list[Tensor]
    num_missing: int = 0
    work: dist.Work | None = None

    def reset(self) -> None:
        self.num_missing, self.work = len(self.masters), None

    def start(self, axis: Axis) -> None:
        """Starts the sum over the axis and leaves each gradient as a view of the travelling buffer."""
        gradients = [torch.zeros_like(m) if m.grad is None else m.grad for m in self.masters]
        # A gradient that is a bucket of its own needs no copy.
        flat = gradients[0].reshape(-1) if len(gradients) == 1 else torch.cat([g.reshape(-1) for g in gradients])
        for master, piece in zip(self.masters, flat.split([g.numel() for g in gradients]), strict=True):
            master.grad = piece.view_as(master)
        self.work = all_reduce_async(flat, axis)  # conjugate: all data ranks compute with the same weights


def _master(parameter: nn.Parameter, compute_dtype: torch.dtype | None) -> Tensor:
    """The tensor to update; `parameter` itself goes on in `compute_dtype`. A frozen one needs no second copy."""
    if compute_dtype in (None, parameter.dtype) or not parameter.is_floating_point():
        return parameter
    master = parameter.data
    # Assigning .data keeps the Parameter object, and with it the ties between modules.
    parameter.data = master.to(compute_dtype)
    return master if parameter.requires_grad else parameter
