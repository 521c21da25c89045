"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half order of Hugging Face weights.

Legend: s sequence, b micro-batch, n heads, d head dimension.
"""

from __future__ import annotations

import math

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
    """Makes the table of cosines and sines, and keeps the one for consecutive positions.

    The table is no module buffer: nothing to save, and moving a module between devices cannot spoil it.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None):
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        self._consecutive: Tensor | None = None

    def table(self, length: int, position_ids: Tensor | None, like: Tensor) -> Tensor:
        """position_ids: [b, s], or None for 0, 1, 2, ... -> cos and sin stacked: [2, s, b or 1, 1, d/2], as `like`."""
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
        return torch.stack((angles.cos(), angles.sin())).unsqueeze(3).to(like.dtype)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """x: [s, b, n, d], table: [2, s, b or 1, 1, d/2] -> x with each (i, i + d/2) pair turned by its angle."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
