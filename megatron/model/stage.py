"""The part of the model that one pipeline stage holds: some layers, and the embedding or the head at the ends.

Legend: s sequence, b micro-batch, h hidden, v padded vocabulary, tp tensor ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.collectives import split
from megatron.core.random import DropoutStreams
from megatron.core.recompute import RecomputePolicy
from megatron.core.sharding import Block, ShardSpec
from megatron.core.tensor_parallel.embedding import VocabParallelEmbedding
from megatron.core.tensor_parallel.linear import ColumnParallelLinear
from megatron.core.tensor_parallel.parameters import ShardedModule, replicated_gradient
from megatron.core.topology import Axis
from megatron.model.attention_kernels import AttentionKernel, AttentionPattern, sdpa_attention
from megatron.model.block import TransformerLayer, make_norm
from megatron.model.config import ModelConfig
from megatron.model.rope import RotaryEmbedding

EMBEDDING_LAYER = -1  # stands for the embedding where a dropout stream asks for a layer


@dataclass(frozen=True)
class StageOptions:
    """How a stage computes, as far as it does not change what it computes.

    `padded_vocab_size` is the number of vocabulary rows stored over all tensor ranks. `compile` fuses
    the elementwise work between linears and collectives.
    """

    padded_vocab_size: int
    sequence_parallel: bool = False
    recompute: RecomputePolicy = field(default_factory=RecomputePolicy)
    kernel: AttentionKernel = sdpa_attention
    compile: bool = False


class Stage(nn.Module):
    """The first stage takes tokens [b, s], the others hidden states; the last returns logits, the others hidden states.

    Hidden states between stages are [s, b, h] ([s/tp, b, h] with sequence parallelism), logits
    [s, b, v/tp]. A stage may be first and last. Tied embeddings on two stages are two copies of one
    logical tensor, of which the first stage is the owner.
    """

    def __init__(
        self, config: ModelConfig, layers: range, *, is_first: bool, is_last: bool, axis: Axis, options: StageOptions
    ):
        super().__init__()
        self.config, self.is_first, self.is_last = config, is_first, is_last
        self.recompute, self.is_compiled = options.recompute, options.compile
        # On one tensor rank the sequence is whole, and sequence parallelism the identity.
        sequence_parallel = options.sequence_parallel and axis.size > 1
        self.embedding = Embedding(config, axis, sequence_parallel, options.padded_vocab_size) if is_first else None
        if self.embedding is not None and config.tie_embed_logits and not is_last:
            self.embedding.word.specs["weight"] = replace(self.embedding.word.specs["weight"], tied="owner")
        self.layers = nn.ModuleList(
            TransformerLayer(
                config,
                layer,
                axis=axis,
                sequence_parallel=sequence_parallel,
                kernel=options.kernel,
                checkpoint_core=options.recompute.attention_core,
                compile=options.compile,
            )
            for layer in layers
        )
        self.head = Head(config, axis, sequence_parallel, options, self.embedding) if is_last else None
        is_rotary = config.position_embedding_type == "rotary"
        self.pattern = AttentionPattern(window=config.sliding_window_size)
        self.rope = RotaryEmbedding(config.kv_channels, config.rope_theta, config.rope_scaling) if is_rotary else None

    def forward(
        self,
        x: Tensor,
        seq_length: int,
        position_ids: Tensor | None = None,
        streams: DropoutStreams | None = None,
        *,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """`seq_length` is s, also where x holds a part of it. No `streams`: no dropout.

        position_ids, segment_ids: [b, s]. Tokens attend to their own segment; None: the row is one.
        """
        if self.embedding is not None:
            x = self.embedding(x, position_ids, streams)
        rotary = None if self.rope is None else self.rope.table(seq_length, position_ids, x)
        pattern = self.pattern if segment_ids is None else replace(self.pattern, segment_ids=segment_ids)
        for group, call in self.recompute.groups(len(self.layers)):
            x = call(self._run_layers, group, x, rotary, pattern, streams)
        return x if self.head is None else self.head(x)

    def units(self) -> list[nn.Module]:
        """Submodules whose weights are needed at different times, in the order of the forward pass.

        A tied embedding is needed at both ends of a whole model; it is left to the stage itself.
        """
        if self.config.tie_embed_logits and self.is_first and self.is_last:
            return list(self.layers)
        ends = (self.embedding, *self.layers, self.head)
        return [module for module in ends if module is not None]

    def _run_layers(
        self,
        group: range,
        x: Tensor,
        rotary: Tensor | None,
        pattern: AttentionPattern,
        streams: DropoutStreams | None,
    ) -> Tensor:
        for i in group:
            x = self.layers[i](x, rotary, pattern, streams)
        return x


class Embedding(nn.Module):
    """tokens: [b, s] -> [s, b, h] (s/tp with sequence parallelism), with absolute positions and dropout."""

    def __init__(self, config: ModelConfig, axis: Axis, sequence_parallel: bool, padded_vocab_size: int):
        super().__init__()
        self.dropout, self.axis, self.sequence_parallel = config.hidden_dropout, axis, sequence_parallel
        self.word = VocabParallelEmbedding(
            _vocabulary_block("embedding.word.weight", config, padded_vocab_size),
            axis=axis,
            sequence_parallel=sequence_parallel,
        )
        self.scale = math.sqrt(config.hidden_size) if config.scale_embeddings else None
        is_absolute = config.position_embedding_type == "absolute"
        self.position = PositionEmbedding(config, sequence_parallel) if is_absolute else None

    def forward(self, tokens: Tensor, position_ids: Tensor | None, streams: DropoutStreams | None) -> Tensor:
        x = self.word(tokens)
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype).item()  # rounded as the hidden states are
        if self.position is not None:
            positions = self.position(tokens.shape[1], position_ids)
            x = x + (split(positions, self.axis) if self.sequence_parallel else positions)
        if streams is None:
            return x
        shard = self.axis.rank if self.sequence_parallel else 0
        return streams.dropout(x, self.dropout, layer=EMBEDDING_LAYER, site="embedding", shard=shard)


class PositionEmbedding(ShardedModule):
    """Learned absolute positions, held by every tensor rank: -> [s, b or 1, h]."""

    weight: nn.Parameter

    def __init__(self, config: ModelConfig, sequence_parallel: bool):
        super().__init__()
        block = Block("embedding.position.weight", (config.max_position_embeddings, config.hidden_size))
        spec = ShardSpec((block,), gradient=replicated_gradient(sequence_parallel))
        self.declare("weight", spec, tp_size=1)

    def forward(self, seq_length: int, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            return self.weight[:seq_length].unsqueeze(1)
        return F.embedding(position_ids.t(), self.weight)


class Head(nn.Module):
    """Hidden states -> logits [s, b, v/tp]. Tied, it uses the embedding's parameter, or its copy on another stage."""

    def __init__(
        self,
        config: ModelConfig,
        axis: Axis,
        sequence_parallel: bool,
        options: StageOptions,
        embedding: Embedding | None,
    ):
        super().__init__()
        self.norm = make_norm(config, "final_norm", sequence_parallel, compile=options.compile)
        name = "embedding.word.weight" if config.tie_embed_logits else "head.weight"
        block = _vocabulary_block(name, config, options.padded_vocab_size)
        self.projection = ColumnParallelLinear((block,), axis=axis, sequence_parallel=sequence_parallel)
        if config.tie_embed_logits and embedding is not None:
            self.projection.weight = embedding.word.weight
        elif config.tie_embed_logits:
            spec = self.projection.specs["weight"]
            self.projection.specs["weight"] = replace(spec, tied="copy")

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.norm(x))


def _vocabulary_block(name: str, config: ModelConfig, padded_vocab_size: int) -> Block:
    shape = (config.vocab_size, config.hidden_size)
    return Block(name, shape, units=config.vocab_size, padded_units=padded_vocab_size)
