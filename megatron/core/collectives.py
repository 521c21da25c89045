"""Collectives over one axis, plain and as conjugate autograd pairs.

The plain ones (`all_reduce`, `all_gather`, `reduce_scatter`, `split`) work on detached data. The pairs
make an operation differentiable by the one that transposes it:

    forward                             backward      used where
    reduce_from_ranks  all-reduce       identity      output of the embedding
    scatter_sequence   reduce-scatter   all-gather    output of the embedding, sequence parallel
    gather_last_dim    all-gather       split         whole logits from vocabulary shards

The linears (core/tensor_parallel/linear.py) have their pairs inside: identity with all-reduce and all-gather with
reduce-scatter on the way in, and the two of the embedding on the way out, overlapped with the weight gradient.

Everything is the identity on an axis of size 1. Sequences are dimension 0: [s, b, h] <-> [s/tp, b, h].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.topology import Axis

# torch 2.13 renamed the single-tensor all-gather and reduce-scatter and warns at the old names.
_all_gather_single: Final = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Final = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, axis: Axis, op: Literal["sum", "max"] = "sum") -> Tensor:
    """Reduces `x` in place over the axis and returns it."""
    work = all_reduce_async(x, axis, op)
    wait(work)
    return x


def all_reduce_async(x: Tensor, axis: Axis, op: Literal["sum", "max"] = "sum") -> dist.Work | None:
    """Starts reducing `x` in place; wait on the result before reading `x`. None when there is nothing to wait for."""
    if axis.size == 1:
        return None
    reduce_op = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
    return dist.all_reduce(x, op=reduce_op, group=axis.group, async_op=True)


def wait(work: dist.Work | None) -> None:
    """Waits for what an `..._async` function started."""
    if work is not None:
        work.wait()


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[n, ...] on each rank -> [n * size, ...], rank by rank along dimension 0."""
    gathered, work = all_gather_async(x, axis)
    wait(work)
    return gathered


def all_gather_async(x: Tensor, axis: Axis) -> tuple[Tensor, dist.Work | None]:
    """Starts `all_gather`; wait on the second result before reading the first."""
    if axis.size == 1:
        return x, None
    gathered = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    return gathered, _all_gather_single(gathered, x.contiguous(), group=axis.group, async_op=True)


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[n * size, ...] -> the sum over ranks of this rank's [n, ...]. `x` may be overwritten."""
    scattered, work = reduce_scatter_async(x, axis)
    wait(work)
    return scattered


def reduce_scatter_async(x: Tensor, axis: Axis) -> tuple[Tensor, dist.Work | None]:
    """Starts `reduce_scatter`; wait on the second result before reading the first."""
    if axis.size == 1:
        return x, None
    if x.device.type == "cpu":
        # Measured: gloo's reduce-scatter is slower than its all-reduce of the same tensor at every size.
        x = x.contiguous()
        return split(x, axis), all_reduce_async(x, axis)
    scattered = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return scattered, _reduce_scatter_single(scattered, x.contiguous(), group=axis.group, async_op=True)


def split(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of `x` along dimension 0, as a view: [n * size, ...] -> [n, ...]."""
    return x.chunk(axis.size, dim=0)[axis.rank]


def reduce_from_ranks(x: Tensor, axis: Axis) -> Tensor:
    """The sum of `x` over ranks, which takes the memory of `x`."""
    return _conjugate(x, axis, all_reduce, _identity)  # backward: identity


def scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """[s, b, h], one summand on each rank -> [s/tp, b, h], summed. May take the memory of `x`."""
    return _conjugate(x, axis, reduce_scatter, all_gather)  # backward: all-gather


def gather_last_dim(x: Tensor, axis: Axis) -> Tensor:
    """[..., v/tp] -> [..., v], alike on all ranks."""
    return _conjugate(x, axis, _all_gather_last_dim, _split_last_dim)  # backward: split


def _identity(x: Tensor, axis: Axis) -> Tensor:
    return x


def _all_gather_last_dim(x: Tensor, axis: Axis) -> Tensor:
    return all_gather(x.movedim(-1, 0), axis).movedim(0, -1)


def _split_last_dim(x: Tensor, axis: Axis) -> Tensor:
    return x.chunk(axis.size, dim=-1)[axis.rank]


Operation = Callable[[Tensor, Axis], Tensor]


def _conjugate(x: Tensor, axis: Axis, forward: Operation, backward: Operation) -> Tensor:
    return x if axis.size == 1 else _Conjugate.apply(x, axis, forward, backward)


class _Conjugate(torch.autograd.Function):
    """An operation on detached data, differentiated by its transpose, which leaves the gradient it gets alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward: Operation, backward: Operation) -> Tensor:
        ctx.axis, ctx.backward_operation = axis, backward
        return forward(x.view_as(x), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.backward_operation(grad, ctx.axis), None, None, None
