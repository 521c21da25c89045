"""One transformer layer: attention and MLP, one after the other or side by side, added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from megatron.core.random import DropoutStreams
from megatron.core.recompute import Checkpoint
from megatron.core.tensor_parallel.linear import row_parallel_sum
from megatron.core.topology import Axis
from megatron.model.attention import SelfAttention
from megatron.model.attention_kernels import AttentionKernel, AttentionPattern
from megatron.model.config import ModelConfig
from megatron.model.mlp import MLP
from megatron.model.norm import make_norm


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
        self.is_parallel, self.is_post_norm = config.parallel_attn, config.use_post_ln
        has_mlp_norm = config.parallel_layernorm or not config.parallel_attn
        mlp_norm = f"layers.{layer}.mlp_norm"
        self.mlp_norm = make_norm(config, mlp_norm, sequence_parallel, compile=compile) if has_mlp_norm else None
        self.mlp = MLP(config, layer, axis=axis, sequence_parallel=sequence_parallel, compile=compile)

    def forward(
        self, x: Tensor, rotary: Tensor | None, pattern: AttentionPattern, streams: DropoutStreams | None
    ) -> Tensor:
        if self.is_parallel:
            return self._side_by_side(x, rotary, pattern, streams)
        normed = x if self.is_post_norm else self.attention_norm(x)
        attended = self._drop(self.attention(normed, rotary, pattern, streams), "attention_output", streams)
        assert self.mlp_norm is not None
        if self.is_post_norm:
            _, x = self.attention_norm.after_residual(x, attended)
            _, x = self.mlp_norm.after_residual(x, self._drop(self.mlp(x), "mlp_output", streams))
            return x
        x, normed = self.mlp_norm.after_residual(x, attended)
        return x + self._drop(self.mlp(normed), "mlp_output", streams)

    def _side_by_side(
        self, x: Tensor, rotary: Tensor | None, pattern: AttentionPattern, streams: DropoutStreams | None
    ) -> Tensor:
        normed = self.attention_norm(x)
        for_mlp = normed if self.mlp_norm is None else self.mlp_norm(x)
        context, activated = self.attention.context(normed, rotary, pattern, streams), self.mlp.activated(for_mlp)
        both = row_parallel_sum(self.attention.output, context, self.mlp.down, activated)
        return x + self._drop(both, "parallel_output", streams)

    def _drop(self, x: Tensor, site: str, streams: DropoutStreams | None) -> Tensor:
        return x if streams is None else streams.dropout(x, self.dropout, layer=self.layer, site=site, shard=self.shard)
