"""One transformer layer: attention and MLP, each behind a norm and added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.core.random import DropoutStreams
from megatron.core.recompute import Checkpoint
from megatron.core.topology import Axis
from megatron.model.attention import AttentionKernel, SelfAttention
from megatron.model.config import ModelConfig
from megatron.model.mlp import MLP
from megatron.model.norm import Norm


class TransformerLayer(nn.Module):
    """x: [s, b, h] -> [s, b, h] (s/tp with sequence parallelism). `layer` counts over the whole model."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        axis: Axis,
        sequence_parallel: bool,
        kernel: AttentionKernel,
        checkpoint_core: Checkpoint,
        compile: bool = False,
    ):
        super().__init__()
        self.layer, self.dropout = layer, config.hidden_dropout
        # With sequence parallelism each tensor rank masks its own part of the sequence.
        self.shard = axis.rank if sequence_parallel else 0
        self.attention_norm = make_norm(config, f"layers.{layer}.attention_norm", sequence_parallel, compile=compile)
        self.attention = SelfAttention(
            config,
            layer,
            axis=axis,
            sequence_parallel=sequence_parallel,
            kernel=kernel,
            checkpoint_core=checkpoint_core,
            compile=compile,
        )
        self.mlp_norm = make_norm(config, f"layers.{layer}.mlp_norm", sequence_parallel, compile=compile)
        self.mlp = MLP(config, layer, axis=axis, sequence_parallel=sequence_parallel, compile=compile)

    def forward(self, x: Tensor, rotary: Tensor | None, streams: DropoutStreams | None) -> Tensor:
        attended = self._drop(self.attention(self.attention_norm(x), rotary, streams), "attention_output", streams)
        x, normed = self.mlp_norm.after_residual(x, attended)
        return x + self._drop(self.mlp(normed), "mlp_output", streams)

    def _drop(self, x: Tensor, site: str, streams: DropoutStreams | None) -> Tensor:
        return x if streams is None else streams.dropout(x, self.dropout, layer=self.layer, site=site, shard=self.shard)


def make_norm(config: ModelConfig, name: str, sequence_parallel: bool, *, compile: bool = False) -> Norm:
    """The norm this architecture uses everywhere, over the hidden dimension."""
    return Norm(
        name,
        config.hidden_size,
        epsilon=config.layernorm_epsilon,
        use_rms_norm=config.use_rms_norm,
        sequence_parallel=sequence_parallel,
        compile=compile,
    )
