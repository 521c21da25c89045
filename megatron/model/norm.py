"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) and LayerNorm over the hidden dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.sharding import Block, ShardSpec
from megatron.core.tensor_parallel.parameters import ShardedModule


class Norm(ShardedModule):
    """x: [..., h] -> [..., h]. Half precision is normalised in float32; wider types stay as they are.

    `sequence_parallel`: each tensor rank sees a part of the sequence, so gradients must be summed over them.
    """

    def __init__(self, name: str, hidden_size: int, *, epsilon: float, use_rms_norm: bool, sequence_parallel: bool):
        super().__init__()
        self.epsilon, self.use_rms_norm = epsilon, use_rms_norm
        gradient = "partial" if sequence_parallel else "complete"
        self.declare("weight", ShardSpec((Block(f"{name}.weight", (hidden_size,)),), gradient=gradient), tp_size=1)
        if use_rms_norm:
            self.bias = None
        else:
            self.declare("bias", ShardSpec((Block(f"{name}.bias", (hidden_size,)),), gradient=gradient), tp_size=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        if not self.use_rms_norm:
            return F.layer_norm(
                wide, x.shape[-1:], self.weight.to(wide.dtype), self.bias.to(wide.dtype), self.epsilon
            ).to(x.dtype)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return normed.to(x.dtype) * self.weight
