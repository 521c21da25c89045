"""Cross-entropy over logits whose vocabulary is cut over the tensor axis.

Legend: v vocabulary columns of all ranks, tp size of the tensor axis.

Each rank takes the log-sum-exp of its own columns; one gather of two numbers per token then tells all ranks the
log-sum-exp over all columns, and with it the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.collectives import all_gather
from megatron.core.fusion import compiled
from megatron.core.topology import Axis


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, axis: Axis, *, vocab_size: int, compile: bool = False
) -> Tensor:
    """logits: [..., v/tp], targets: [...] -> loss per token in nats: [...], alike on all ranks of the axis.

    Columns at or beyond `vocab_size` are padding and take no part. A target outside the vocabulary has
    an arbitrary finite loss; mask it. Half-precision logits are computed in float32. **Consumes the
    logits**: the forward or the backward pass overwrites them.
    """
    function = _CompiledCrossEntropy if compile else _CrossEntropy
    first = logits.shape[-1] * axis.rank
    return function.apply(logits, targets - first, axis, min(max(vocab_size - first, 0), logits.shape[-1]))


class _CrossEntropy(torch.autograd.Function):
    """Turns the logits into the softmax of this rank's columns and that into the gradient, always in place.

    On a CPU this beats the fused graph below: fresh memory for something as large as logits costs more than a pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, column: Tensor, axis: Axis, num_valid: int) -> Tensor:
        """`column` counts from this rank's first column, and is outside of them where the target is another's."""
        ctx.dtype = logits.dtype
        z = logits.float() if logits.dtype.itemsize < 4 else logits
        # Not -inf: a rank may hold nothing but padding, and its own softmax must be a number.
        z[..., num_valid:] = torch.finfo(z.dtype).min
        is_own = (column >= 0) & (column < z.shape[-1])
        column = (column * is_own).unsqueeze(-1)
        target_logit = torch.where(is_own, z.gather(-1, column).squeeze(-1), 0.0)
        largest = z.amax(dim=-1)
        torch.softmax(z, dim=-1, out=z)
        # The largest term of the softmax is exp(largest - own_lse), and at least one in v.
        own_lse = largest - z.amax(dim=-1).log_()
        loss, lse = _over_all_columns(target_logit, own_lse, axis)
        ctx.save_for_backward(z, column, is_own, (own_lse - lse).exp_())
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, column, is_own, correction = ctx.saved_tensors
        softmax.mul_((correction * grad).unsqueeze(-1))
        softmax.scatter_add_(-1, column, (-grad * is_own).unsqueeze(-1))
        return softmax.to(ctx.dtype), None, None, None


class _CompiledCrossEntropy(torch.autograd.Function):
    """Reads the logits in one pass forward, and turns them into the gradient in one pass backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, column: Tensor, axis: Axis, num_valid: int) -> Tensor:
        target_logit, own_lse = compiled(sum_own_columns)(logits, column, num_valid)
        loss, lse = _over_all_columns(target_logit, own_lse, axis)
        ctx.save_for_backward(logits, column, lse)
        ctx.num_valid = num_valid
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, column, lse = ctx.saved_tensors
        compiled(turn_into_gradient)(logits, column, lse, grad, ctx.num_valid)
        return logits, None, None, None


def sum_own_columns(logits: Tensor, column: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
    """The target's logit (0 where another rank has it) and the log-sum-exp of this rank's columns, per token."""
    z = logits.float() if logits.dtype.itemsize < 4 else logits
    if num_valid < z.shape[-1]:
        z = torch.where(torch.arange(z.shape[-1], device=z.device) < num_valid, z, torch.finfo(z.dtype).min)
    is_own = (column >= 0) & (column < z.shape[-1])
    target_logit = torch.where(is_own, z.gather(-1, (column * is_own).unsqueeze(-1)).squeeze(-1), 0.0)
    largest = z.amax(dim=-1, keepdim=True)
    return target_logit, largest.squeeze(-1) + (z - largest).exp().sum(dim=-1).log()


def turn_into_gradient(logits: Tensor, column: Tensor, lse: Tensor, grad: Tensor, num_valid: int) -> None:
    """Overwrites the logits with the gradient of the loss."""
    z = logits.float() if logits.dtype.itemsize < 4 else logits
    columns = torch.arange(z.shape[-1], device=z.device)
    softmax = (z - lse.unsqueeze(-1)).exp()
    if num_valid < z.shape[-1]:
        softmax = torch.where(columns < num_valid, softmax, 0.0)
    logits.copy_((softmax - (columns == column.unsqueeze(-1)).to(z.dtype)) * grad.unsqueeze(-1))


def _over_all_columns(target_logit: Tensor, own_lse: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """The loss per token and the log-sum-exp over the whole vocabulary."""
    of_ranks = all_gather(torch.stack((target_logit, own_lse)).unsqueeze(0), axis)  # [tp, 2, ...]
    lse = of_ranks[:, 1].logsumexp(dim=0)
    return lse - of_ranks[:, 0].sum(dim=0), lse
