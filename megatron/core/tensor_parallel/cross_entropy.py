"""Cross-entropy over logits whose vocabulary is cut over the tensor axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.collectives import all_reduce
from megatron.core.topology import Axis


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis, *, vocab_size: int) -> Tensor:
    """logits: [..., v/tp], targets: [...] -> loss per token in nats: [...], alike on all ranks of the axis.

    Columns at or beyond `vocab_size` are padding and take no part. A target outside the vocabulary has
    an arbitrary finite loss; mask it. Half-precision logits are computed in float32. **Consumes the
    logits**: their memory holds the softmax afterwards, which the backward pass turns into the gradient.
    """
    return _VocabParallelCrossEntropy.apply(logits, targets, axis, vocab_size)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, vocab_size: int) -> Tensor:
        ctx.dtype = logits.dtype
        z = logits.float() if logits.dtype.itemsize < 4 else logits
        first = z.shape[-1] * axis.rank
        if first + z.shape[-1] > vocab_size:
            z[..., max(0, vocab_size - first) :] = -torch.inf
        z.sub_(all_reduce(z.amax(dim=-1), axis, "max").unsqueeze(-1))
        mine = (targets >= first) & (targets < first + z.shape[-1])
        column = ((targets - first) * mine).unsqueeze(-1)
        target_logit = torch.where(mine, z.gather(-1, column).squeeze(-1), 0.0)
        z.exp_()
        target_logit, total = all_reduce(torch.stack((target_logit, z.sum(dim=-1))), axis).unbind()
        z.div_(total.unsqueeze(-1))
        ctx.save_for_backward(z, column, mine)
        return total.log() - target_logit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, column, mine = ctx.saved_tensors
        softmax.scatter_add_(-1, column, -mine.unsqueeze(-1).to(softmax.dtype))
        return softmax.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None, None, None
