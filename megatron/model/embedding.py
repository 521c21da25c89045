"""Tokens to hidden states, on the first stage.

Legend: s sequence, b micro-batch, h hidden, tp tensor ranks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.collectives import split
from megatron.core.random import DropoutStreams
from megatron.core.sharding import Block, ShardSpec
from megatron.core.tensor_parallel.embedding import VocabParallelEmbedding
from megatron.core.tensor_parallel.parameters import ShardedModule, replicated_gradient
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig
from megatron.model.norm import make_norm

EMBEDDING_LAYER = -1  # stands for the embedding where a dropout stream asks for a layer


class Embedding(nn.Module):
    """tokens: [b, s] -> [s, b, h] (s/tp with sequence parallelism): words, and what the architecture adds to them."""

    def __init__(
        self,
        config: ModelConfig,
        axis: Axis,
        sequence_parallel: bool,
        padded_vocab_size: int,
        *,
        compile: bool = False,
    ):
        super().__init__()
        self.dropout, self.axis, self.sequence_parallel = config.hidden_dropout, axis, sequence_parallel
        self.word = VocabParallelEmbedding(
            vocabulary_block("embedding.word.weight", config, padded_vocab_size),
            axis=axis,
            sequence_parallel=sequence_parallel,
        )
        self.scale = math.sqrt(config.hidden_size) if config.scale_embeddings else None
        self.position, self.token_type, self.norm = None, None, None
        if config.position_embedding_type == "absolute":
            self.position = Table(
                "embedding.position.weight", config.max_position_embeddings, config, sequence_parallel
            )
        if config.num_token_types:
            self.token_type = Table("embedding.token_type.weight", config.num_token_types, config, sequence_parallel)
        if config.embedding_layernorm:
            self.norm = make_norm(config, "embedding.norm", sequence_parallel, compile=compile)

    def forward(
        self, tokens: Tensor, position_ids: Tensor | None, token_types: Tensor | None, streams: DropoutStreams | None
    ) -> Tensor:
        """position_ids, token_types: [b, s], or None for 0, 1, 2, ... and for type 0."""
        x = self.word(tokens)
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype).item()  # rounded as the hidden states are
        if self.position is not None:
            positions = self.position.first(tokens.shape[1]) if position_ids is None else self.position(position_ids)
            x = x + self._own_part(positions)
        if self.token_type is not None:
            x = x + self._own_part(self.token_type(torch.zeros_like(tokens) if token_types is None else token_types))
        if self.norm is not None:
            x = self.norm(x)
        if streams is None:
            return x
        shard = self.axis.rank if self.sequence_parallel else 0
        return streams.dropout(x, self.dropout, layer=EMBEDDING_LAYER, site="embedding", shard=shard)

    def _own_part(self, x: Tensor) -> Tensor:
        return split(x, self.axis) if self.sequence_parallel else x


class Table(ShardedModule):
    """Learned vectors for a few numbers, held by every tensor rank: [b, s] -> [s, b, h]."""

    weight: nn.Parameter

    def __init__(self, name: str, num_rows: int, config: ModelConfig, sequence_parallel: bool):
        super().__init__()
        block = Block(name, (num_rows, config.hidden_size))
        self.declare("weight", ShardSpec((block,), gradient=replicated_gradient(sequence_parallel)), tp_size=1)

    def forward(self, numbers: Tensor) -> Tensor:
        return F.embedding(numbers.t(), self.weight)

    def first(self, count: int) -> Tensor:
        """The vectors of 0, 1, 2, ...: [s, 1, h]."""
        return self.weight[:count].unsqueeze(1)


def vocabulary_block(name: str, config: ModelConfig, padded_vocab_size: int) -> Block:
    """A row for each token."""
    shape = (config.vocab_size, config.hidden_size)
    return Block(name, shape, units=config.vocab_size, padded_units=padded_vocab_size)
