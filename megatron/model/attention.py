"""Causal self-attention with grouped key/value heads, cut over the tensor axis by heads.

Legend: s sequence, b micro-batch, h hidden, n query heads, k key/value heads, d head dimension, tp tensor ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.fusion import compiled
from megatron.core.random import DropoutStreams
from megatron.core.recompute import Checkpoint
from megatron.core.sharding import Block
from megatron.core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig
from megatron.model.rope import SplitAndRotate, split_and_rotate

AttentionKernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""q: [s, b, n, d], k and v: [s, b, k, d], dropout -> [s, b, n, d], causal, scaled by 1/sqrt(d)."""


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """torch's scaled_dot_product_attention."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.permute(2, 0, 1, 3)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The flash-attn package (Dao 2023, arXiv 2307.08691); half precision on CUDA only."""
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return flash_attn_func(
        q, k, v, dropout_p=dropout, causal=True, deterministic=torch.are_deterministic_algorithms_enabled()
    ).transpose(0, 1)


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
        self.split_and_rotate = compiled(split_and_rotate) if compile else SplitAndRotate.apply
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
        self.output = RowParallelLinear(
            Block(f"{name}.output.weight", (h, n * d), units=n),
            axis=axis,
            bias=config.attention_output_bias,
            sequence_parallel=sequence_parallel,
        )

    def forward(self, x: Tensor, rotary: Tensor | None, streams: DropoutStreams | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        if rotary is None:
            q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        else:
            q, k, v = self.split_and_rotate(qkv, rotary, self.num_heads, self.num_kv_heads)
        context = self.checkpoint_core(self._core, q, k, v, streams)
        return self.output(context.flatten(2))

    def _core(self, q: Tensor, k: Tensor, v: Tensor, streams: DropoutStreams | None) -> Tensor:
        """[s, b, n/tp, d] and [s, b, k/tp, d] twice -> [s, b, n/tp, d]."""
        if streams is None or self.dropout == 0.0:
            return self.kernel(q, k, v, 0.0)
        # The kernel draws its own mask, over this rank's heads, from the default generator.
        with streams.default_generator(q.device, layer=self.layer, site="attention", shard=self.axis.rank):
            return self.kernel(q, k, v, self.dropout)
