"""The token embedding, its rows cut over the tensor axis."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.collectives import reduce_from_ranks, scatter_sequence
from megatron.core.sharding import Block, ShardSpec
from megatron.core.tensor_parallel.parameters import ShardedModule
from megatron.core.topology import Axis


class VocabParallelEmbedding(ShardedModule):
    """tokens: [b, s] -> [s, b, h], or this rank's [s/tp, b, h] with sequence parallelism."""

    weight: nn.Parameter

    def __init__(self, block: Block, *, axis: Axis, sequence_parallel: bool = False):
        super().__init__()
        self.axis, self.sequence_parallel = axis, sequence_parallel
        self.rows = block.unit_range(axis.rank, axis.size)
        self.declare("weight", ShardSpec((block,), dim=0), axis.size)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.t()
        if self.axis.size == 1:
            return F.embedding(tokens, self.weight)
        mine = (tokens >= self.rows.start) & (tokens < self.rows.stop)
        found = F.embedding((tokens - self.rows.start) * mine, self.weight) * mine.unsqueeze(-1)
        if self.sequence_parallel:
            return scatter_sequence(found, self.axis)  # backward: all-gather
        return reduce_from_ranks(found, self.axis)  # backward: identity
