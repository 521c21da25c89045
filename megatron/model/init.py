"""Initial weights as a function of the seed and the logical tensor, alike on every layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.core.random import normal_slice
from megatron.core.sharding import Region
from megatron.model.config import ModelConfig


def initial_value(config: ModelConfig, seed: int, region: Region) -> Tensor:
    """The initial weights of one region: float32 on the CPU.

    Matrices are N(0, init_method_std); those that write to the residual stream are scaled by
    1/sqrt(2 * num_layers) (Radford et al. 2019, GPT-2). Norms start as the identity, biases at 0.
    """
    if region.name.endswith("norm.weight"):
        return torch.zeros(region.size) if config.apply_layernorm_1p else torch.ones(region.size)
    if region.name.endswith(".bias"):
        return torch.zeros(region.size)
    std = config.init_method_std
    if region.name.endswith((".attention.output.weight", ".mlp.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return normal_slice(seed, region.name, region.start, region.size) * std
