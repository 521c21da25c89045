"""Self-attention with grouped key/value heads, cut over the tensor axis by heads.

Legend: s sequence, b micro-batch, h hidden, n query heads, k key/value heads, d head dimension, tp tensor ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron.core.fusion import compiled
from megatron.core.random import DropoutStreams
from megatron.core.recompute import Checkpoint
from megatron.core.sharding import Block
from megatron.core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.core.topology import Axis
from megatron.model.attention_kernels import AttentionKernel, AttentionPattern
from megatron.model.config import ModelConfig
from megatron.model.norm import Norm, normalise
from megatron.model.rope import Rotate, SplitAndRotate, rotate, split_and_rotate


class SelfAttention(nn.Module):
    """x: [s, b, h] -> [s, b, h] (s/tp with sequence parallelism)."""

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
        self.is_compiled = compile
        self.layer, self.axis, self.kernel, self.checkpoint_core = layer, axis, kernel, checkpoint_core
        self.dropout, self.head_dim = config.attention_dropout, config.kv_channels
        name, h, d = f"layers.{layer}.attention", config.hidden_size, config.kv_channels
        n, k = config.num_attention_heads, config.num_attention_heads_kv
        blocks = tuple(
            Block(f"{name}.{part}.weight", (heads * d, h), units=heads)
            for part, heads in (("q", n), ("k", k), ("v", k))
        )
        self.num_heads, self.num_kv_heads, _ = (len(block.unit_range(axis.rank, axis.size)) for block in blocks)
        self.qkv = ColumnParallelLinear(blocks, axis=axis, bias=config.qkv_bias, sequence_parallel=sequence_parallel)
        self.q_norm = _head_norm(config, f"{name}.q_norm", axis, compile=compile) if config.qk_layernorm else None
        self.k_norm = _head_norm(config, f"{name}.k_norm", axis, compile=compile) if config.qk_layernorm else None
        self.output = RowParallelLinear(
            Block(f"{name}.output.weight", (h, n * d), units=n),
            axis=axis,
            bias=config.attention_output_bias,
            sequence_parallel=sequence_parallel,
        )

    def forward(
        self, x: Tensor, rotary: Tensor | None, pattern: AttentionPattern, streams: DropoutStreams | None
    ) -> Tensor:
        return self.output(self.context(x, rotary, pattern, streams))

    def context(
        self, x: Tensor, rotary: Tensor | None, pattern: AttentionPattern, streams: DropoutStreams | None
    ) -> Tensor:
        """What the output projection takes: [s, b, n d/tp]."""
        q, k, v = self._heads(self.qkv(x).unflatten(-1, (-1, self.head_dim)), rotary)
        return self.checkpoint_core(self._core, q, k, v, pattern, streams).flatten(2)

    def _heads(self, qkv: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, (n + 2k)/tp, d] -> q: [s, b, n/tp, d], k and v: [s, b, k/tp, d]; q and k normed and rotated."""
        if self.q_norm is None or self.k_norm is None:
            if rotary is None:
                q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
                return q, k, v
            function = compiled(split_and_rotate) if self.is_compiled else SplitAndRotate.apply
            return function(qkv, rotary, self.num_heads, self.num_kv_heads)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        return self._norm_and_rotate(q, self.q_norm, rotary), self._norm_and_rotate(k, self.k_norm, rotary), v

    def _norm_and_rotate(self, x: Tensor, norm: Norm, rotary: Tensor | None) -> Tensor:
        if rotary is None:
            return norm(x)
        if self.is_compiled:
            return compiled(norm_and_rotate)(x, norm.weight, norm.epsilon, norm.one_plus, rotary)
        return Rotate.apply(norm(x), rotary)

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, streams: DropoutStreams | None
    ) -> Tensor:
        """[s, b, n/tp, d] and [s, b, k/tp, d] twice -> [s, b, n/tp, d]."""
        if streams is None or self.dropout == 0.0:
            return self.kernel(q, k, v, pattern, 0.0)
        # The kernel draws its own mask, over this rank's heads, from the default generator.
        with streams.default_generator(q.device, layer=self.layer, site="attention", shard=self.axis.rank):
            return self.kernel(q, k, v, pattern, self.dropout)


def norm_and_rotate(x: Tensor, weight: Tensor, epsilon: float, one_plus: bool, table: Tensor) -> Tensor:
    return rotate(normalise(x, weight, None, epsilon, one_plus), table)


def _head_norm(config: ModelConfig, name: str, axis: Axis, *, compile: bool) -> Norm:
    """RMSNorm over the dimension of a head. Every rank sees other heads, so the gradients are always summed."""
    return Norm(
        name,
        config.kv_channels,
        epsilon=config.layernorm_epsilon,
        use_rms_norm=True,
        one_plus=config.apply_layernorm_1p,
        gradient="partial" if axis.size > 1 else "complete",
        compile=compile,
    )
