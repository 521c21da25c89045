"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half order of Hugging Face weights.

Legend: s sequence, b micro-batch, n query heads, k key/value heads, d head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron.model.config import RopeScaling


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[d/2] angles per position, in float32: the precision in which published checkpoints were trained."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if scaling is None:
        return frequencies
    if scaling.type == "linear":
        return frequencies / scaling.factor
    return _stretch_low_frequencies(frequencies, scaling)


def _stretch_low_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: wavelengths over `original / low_freq_factor` are stretched, those under `original / high_freq_factor`
    kept, those between blended."""
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    # 0 at the longest wavelength that is kept stretched, 1 at the shortest that is blended.
    blend = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    stretched = torch.where(wavelength > original / scaling.low_freq_factor, frequencies / scaling.factor, frequencies)
    is_between = (wavelength >= original / scaling.high_freq_factor) & (
        wavelength <= original / scaling.low_freq_factor
    )
    return torch.where(is_between, blended, stretched)


class RotaryEmbedding:
    """Makes the table that `split_and_rotate` takes, and keeps the one for consecutive positions.

    It holds cos and sin of every angle over the whole head dimension, the sines of its first half negated, so that
    turning is ``x * cos + swapped(x) * sin`` in whole rows.

    The table is no module buffer: nothing to save, and moving a module between devices cannot spoil it.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None):
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        self._consecutive: Tensor | None = None

    def table(self, length: int, position_ids: Tensor | None, like: Tensor) -> Tensor:
        """position_ids: [b, s], or None for 0, 1, 2, ... -> [2, s, b or 1, 1, d], as `like`."""
        if position_ids is not None:
            return self._compute(position_ids.t(), like)
        kept = self._consecutive
        if kept is None or kept.shape[1] < length or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._compute(torch.arange(length, device=like.device).unsqueeze(1), like)
            self._consecutive = kept
        return kept[:, :length]

    def _compute(self, positions: Tensor, like: Tensor) -> Tensor:
        with torch.device("cpu"):
            frequencies = rotary_frequencies(self.head_dim, self.theta, self.scaling)
        angles = positions.float().unsqueeze(-1) * frequencies.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).unsqueeze(3).to(like.dtype)


def split_and_rotate(qkv: Tensor, table: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv: [s, b, n + 2k, d], table: [2, s, b or 1, 1, d] -> q: [s, b, n, d], k and v: [s, b, k, d].

    Each (i, i + d/2) pair of q and k is turned by its angle.
    """
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    return rotate(q, table), rotate(k, table), v


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x: [s, b, n, d], table: [2, s, b or 1, 1, d]. Each (i, i + d/2) pair is turned by its angle."""
    cos, sin = table
    return x * cos + _swap_halves(x) * sin


class SplitAndRotate(torch.autograd.Function):
    """`split_and_rotate` that keeps nothing but the table, and writes the gradients of q, k and v into one tensor."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, table: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.table, ctx.heads = table, (num_heads, num_kv_heads, num_kv_heads)
        qk, v = qkv.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
        turned = torch.empty_like(qk, memory_format=torch.contiguous_format)
        _turn(qk, *table, out=turned)
        q, k = turned.split((num_heads, num_kv_heads), dim=2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None, None]:
        s, b, _, d = grad_v.shape
        grad = grad_v.new_empty((s, b, sum(ctx.heads), d))
        for_q, for_k, for_v = grad.split(ctx.heads, dim=2)
        cos, sin = ctx.table
        _turn(grad_q, cos, -sin, out=for_q)  # backwards, by the negative angle
        _turn(grad_k, cos, -sin, out=for_k)
        for_v.copy_(grad_v)
        return grad, None, None, None


class Rotate(torch.autograd.Function):
    """`rotate` that keeps nothing but the table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.table = table
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _turn(x, *table, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cos, sin = ctx.table
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        _turn(grad, cos, -sin, out=out)  # backwards, by the negative angle
        return out, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor) -> None:
    half = x.shape[-1] // 2
    out[..., :half] = x[..., half:]
    out[..., half:] = x[..., :half]
    out.mul_(sin).addcmul_(x, cos)


def _swap_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)
