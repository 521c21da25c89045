"""Linear layers cut over the tensor axis (Shoeybi et al. 2019, arXiv 1909.08053; sequence parallelism: Korthikanti et
al. 2022, arXiv 2205.05198).

Legend: s sequence, b micro-batch, i input features, o output features, tp size of the tensor axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.collectives import (
    all_gather,
    all_gather_async,
    all_reduce,
    all_reduce_async,
    reduce_from_ranks,
    reduce_scatter,
    reduce_scatter_async,
    scatter_sequence,
    wait,
)
from megatron.core.sharding import Block, ShardSpec
from megatron.core.tensor_parallel.parameters import ShardedModule, replicated_gradient
from megatron.core.topology import Axis


class ColumnParallelLinear(ShardedModule):
    """x: [s, b, i] -> [s, b, o/tp]. With sequence parallelism x is [s/tp, b, i] and is gathered on the way in.

    The weight is the given blocks stacked along their output features (q | k | v, gate | up); each is
    cut over the axis on its own, and the output holds this rank's part of each, in their order.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, blocks: Sequence[Block], *, axis: Axis, bias: bool = False, sequence_parallel: bool = False):
        super().__init__()
        self.axis, self.sequence_parallel = axis, sequence_parallel
        self.declare("weight", ShardSpec(tuple(blocks), dim=0), axis.size)
        if bias:
            self.declare("bias", ShardSpec(tuple(map(_bias_of, blocks)), dim=0), axis.size)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = _ColumnLinear.apply(x, self.weight, self.axis, self.sequence_parallel)
        return y if self.bias is None else y + self.bias


class RowParallelLinear(ShardedModule):
    """x: [s, b, i/tp] -> [s, b, o] (s/tp with sequence parallelism). The bias is added after the reduction."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, block: Block, *, axis: Axis, bias: bool = False, sequence_parallel: bool = False):
        super().__init__()
        self.axis, self.sequence_parallel = axis, sequence_parallel
        self.declare("weight", ShardSpec((block,), dim=1), axis.size)
        if bias:
            gradient = replicated_gradient(sequence_parallel)
            self.declare("bias", ShardSpec((_bias_of(block),), gradient=gradient), axis.size)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = _RowLinear.apply(x, self.weight, self.axis, self.sequence_parallel)
        return y if self.bias is None else y + self.bias

    def summand(self, x: Tensor) -> Tensor:
        """[s, b, i/tp] -> [s, b, o]: what this rank adds to the output, without the bias."""
        return F.linear(x, self.weight)


def row_parallel_sum(a: RowParallelLinear, x: Tensor, b: RowParallelLinear, y: Tensor) -> Tensor:
    """a(x) + b(y), reduced once."""
    reduce = scatter_sequence if a.sequence_parallel else reduce_from_ranks
    total = reduce(a.summand(x) + b.summand(y), a.axis)  # backward: all-gather, identity
    for bias in (a.bias, b.bias):
        total = total if bias is None else total + bias
    return total


def _bias_of(block: Block) -> Block:
    return replace(block, name=block.name.removesuffix("weight") + "bias", global_shape=block.global_shape[:1])


class _ColumnLinear(torch.autograd.Function):
    """Keeps only this rank's part of x for the backward pass, where it is gathered again behind the input gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        whole = all_gather(x, axis) if sequence_parallel else x  # backward: reduce-scatter, else all-reduce
        return F.linear(whole, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        axis = ctx.axis
        if ctx.sequence_parallel:
            x, gather = all_gather_async(x, axis)
            grad_input, reduction = reduce_scatter_async(grad @ weight, axis)  # overlaps the weight gradient
            wait(gather)
        else:
            grad_input = grad @ weight
            reduction = all_reduce_async(grad_input, axis)  # overlaps the weight gradient
        grad_weight = _weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        wait(reduction)
        return grad_input, grad_weight, None, None


class _RowLinear(torch.autograd.Function):
    """Owns its output, so that the reduction can be done in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        y = F.linear(x, weight)
        return reduce_scatter(y, axis) if sequence_parallel else all_reduce(y, axis)  # backward: all-gather, identity

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.sequence_parallel:
            grad = all_gather(grad, ctx.axis)
        grad_weight = _weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        return grad @ weight, grad_weight, None, None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[..., o], [..., i] -> [o, i], summed over the leading dimensions."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)
