"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) and LayerNorm over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.fusion import compiled
from megatron.core.sharding import Block, GradientKind, ShardSpec
from megatron.core.tensor_parallel.parameters import ShardedModule, replicated_gradient
from megatron.model.config import ModelConfig


class Norm(ShardedModule):
    """x: [..., h] -> [..., h]. Half precision is normalised in float32; wider types stay as they are.

    `one_plus`: the factor is 1 + weight, multiplied in float32. `gradient` is "partial" where each tensor rank sees
    a part of what is normed (of the sequence, of the heads).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        name: str,
        size: int,
        *,
        epsilon: float,
        use_rms_norm: bool,
        one_plus: bool = False,
        gradient: GradientKind = "complete",
        compile: bool = False,
    ):
        super().__init__()
        self.epsilon, self.one_plus, self.is_compiled = epsilon, one_plus, compile
        self.declare("weight", ShardSpec((Block(f"{name}.weight", (size,)),), gradient=gradient), tp_size=1)
        if use_rms_norm:
            self.bias = None
        else:
            self.declare("bias", ShardSpec((Block(f"{name}.bias", (size,)),), gradient=gradient), tp_size=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_compiled:
            return compiled(normalise)(x, self.weight, self.bias, self.epsilon, self.one_plus)
        if self.bias is None:
            return _RMSNorm.apply(x, self.weight, self.epsilon, self.one_plus)
        return normalise(x, self.weight, self.bias, self.epsilon, self.one_plus)

    def after_residual(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """residual + x, and that normed."""
        if self.is_compiled:
            return compiled(add_and_normalise)(residual, x, self.weight, self.bias, self.epsilon, self.one_plus)
        residual = residual + x
        return residual, self(residual)


def make_norm(config: ModelConfig, name: str, sequence_parallel: bool, *, compile: bool = False) -> Norm:
    """The norm this architecture uses everywhere, over the hidden dimension."""
    return Norm(
        name,
        config.hidden_size,
        epsilon=config.layernorm_epsilon,
        use_rms_norm=config.use_rms_norm,
        one_plus=config.apply_layernorm_1p,
        gradient=replicated_gradient(sequence_parallel),
        compile=compile,
    )


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, one_plus: bool = False) -> Tensor:
    """LayerNorm, or RMSNorm where there is no bias."""
    wide, factor = _wide(x), _factor(weight, one_plus)
    if bias is not None:
        return F.layer_norm(wide, x.shape[-1:], _wide(factor), _wide(bias), epsilon).to(x.dtype)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    # Llama rounds before it multiplies by the weight, Gemma after it multiplied by 1 + weight.
    return (normed * factor).to(x.dtype) if one_plus else normed.to(x.dtype) * factor


def add_and_normalise(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, one_plus: bool = False
) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return residual, normalise(residual, weight, bias, epsilon, one_plus)


class _RMSNorm(torch.autograd.Function):
    """`normalise` without a bias. Keeps only x and one number per row, and makes half of autograd's passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, one_plus: bool) -> Tensor:
        wide = _wide(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.one_plus = one_plus
        normed = wide * scale
        if one_plus:
            return normed.mul_(_factor(weight, one_plus)).to(x.dtype)
        return normed.mul_(weight) if x.dtype == normed.dtype else normed.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With n = scale x: dx = scale (g w - n mean(g w n)), dw = sum of g n over the rows."""
        x, weight, scale = ctx.saved_tensors
        grad, wide, wide_weight = _wide(grad), _wide(x), _wide(_factor(weight, ctx.one_plus))
        product = (grad * wide).flatten(0, -2)
        grad_weight = scale.flatten() @ product
        along_x = (product @ wide_weight).view_as(scale).mul_(scale.pow(3)).div_(x.shape[-1])
        grad_x = (grad * wide_weight).mul_(scale).addcmul_(wide, along_x, value=-1)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None


def _factor(weight: Tensor, one_plus: bool) -> Tensor:
    return 1.0 + _wide(weight) if one_plus else weight


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x
