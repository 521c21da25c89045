"""Hidden states to logits, on the last stage.

Legend: s sequence, b micro-batch, h hidden, v padded vocabulary, tp tensor ranks.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from megatron.core.tensor_parallel.linear import ColumnParallelLinear
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig
from megatron.model.embedding import Embedding, vocabulary_block
from megatron.model.norm import make_norm


class Head(nn.Module):
    """Hidden states -> logits [s, b, v/tp]."""

    def __init__(
        self,
        config: ModelConfig,
        axis: Axis,
        sequence_parallel: bool,
        padded_vocab_size: int,
        embedding: Embedding | None,
        *,
        compile: bool = False,
    ):
        super().__init__()
        # With norms behind the sublayers, the last one has normed already.
        has_norm = not config.use_post_ln
        self.norm = make_norm(config, "final_norm", sequence_parallel, compile=compile) if has_norm else None
        self.projection = make_projection(config, axis, sequence_parallel, padded_vocab_size, embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x if self.norm is None else self.norm(x))


def make_projection(
    config: ModelConfig, axis: Axis, sequence_parallel: bool, padded_vocab_size: int, embedding: Embedding | None
) -> ColumnParallelLinear:
    """To the vocabulary. Tied, it uses the parameter of `embedding`, or a copy of it where that is on another stage."""
    name = "embedding.word.weight" if config.tie_embed_logits else "head.weight"
    block = vocabulary_block(name, config, padded_vocab_size)
    projection = ColumnParallelLinear((block,), axis=axis, sequence_parallel=sequence_parallel)
    if config.tie_embed_logits and embedding is not None:
        projection.weight = embedding.word.weight
    elif config.tie_embed_logits:
        projection.specs["weight"] = replace(projection.specs["weight"], tied="copy")
    return projection
