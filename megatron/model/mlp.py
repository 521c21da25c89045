"""The feed-forward block, gated or plain, cut over the tensor axis by features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.fusion import compiled
from megatron.core.sharding import Block
from megatron.core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig
from megatron.model.gate import GatedActivation, gated_activation


class MLP(nn.Module):
    """down(act(gate x) * up x), or down(gelu(up x)) without a gate: [s, b, h] -> [s, b, h] (s/tp with SP)."""

    def __init__(self, config: ModelConfig, layer: int, *, axis: Axis, sequence_parallel: bool, compile: bool = False):
        super().__init__()
        name, h, f = f"layers.{layer}.mlp", config.hidden_size, config.ffn_hidden_size
        self.gate = config.glu_activation
        self.gelu_approximation = "tanh" if config.mlp_activation == "gelu_tanh" else "none"
        self.gated_activation = compiled(gated_activation) if compile else GatedActivation.apply
        parts = ("gate", "up") if self.gate else ("up",)
        self.up = ColumnParallelLinear(
            tuple(Block(f"{name}.{part}.weight", (f, h), units=f) for part in parts),
            axis=axis,
            bias=config.mlp_bias,
            sequence_parallel=sequence_parallel,
        )
        self.down = RowParallelLinear(
            Block(f"{name}.down.weight", (h, f), units=f),
            axis=axis,
            bias=config.mlp_bias,
            sequence_parallel=sequence_parallel,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activated(x))

    def activated(self, x: Tensor) -> Tensor:
        """What the second projection takes: [s, b, f/tp]."""
        y = self.up(x)
        if self.gate is None:
            return F.gelu(y, approximate=self.gelu_approximation)
        return self.gated_activation(y, self.gate)
