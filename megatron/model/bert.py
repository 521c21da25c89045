"""BERT (Devlin et al. 2018, arXiv 1810.04805): its two heads and the loss of its pretraining.

Legend: s sequence, b micro-batch, h hidden, v padded vocabulary, tp tensor ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core.collectives import reduce_from_ranks
from megatron.core.sharding import Block, GradientKind, ShardSpec
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.parameters import ShardedModule, replicated_gradient
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig
from megatron.model.embedding import Embedding, vocabulary_block
from megatron.model.head import make_projection
from megatron.model.norm import make_norm


class BertLogits(NamedTuple):
    """`tokens`: [s, b, v/tp], what was masked; `next_sentence`: [b, 2], whether the second text followed (0) or not."""

    tokens: Tensor
    next_sentence: Tensor


class BertHead(nn.Module):
    """Hidden states [s, b, h] (s/tp with sequence parallelism) -> BertLogits.

    Masked tokens: a dense layer, GELU and a norm, then the (tied) projection with a bias. Next sentence: the first
    token's state through a dense layer and tanh, the pooler, then two numbers.
    """

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
        self.axis, self.sequence_parallel = axis, sequence_parallel
        h = config.hidden_size
        self.transform = Dense("head.transform", h, h, gradient=replicated_gradient(sequence_parallel))
        self.norm = make_norm(config, "head.norm", sequence_parallel, compile=compile)
        self.projection = make_projection(config, axis, sequence_parallel, padded_vocab_size, embedding)
        self.bias = VocabularyBias(vocabulary_block("head.bias", config, padded_vocab_size), axis)
        # The first token is on all tensor ranks, so that all compute the same.
        self.pooler = Dense("pooler", h, h)
        self.next_sentence = Dense("next_sentence", h, 2)

    def forward(self, x: Tensor) -> BertLogits:
        tokens = self.bias(self.projection(self.norm(F.gelu(self.transform(x)))))
        first = x[0]
        if self.sequence_parallel:
            first = reduce_from_ranks(first * self.axis.is_first, self.axis)  # backward: identity
        return BertLogits(tokens, self.next_sentence(torch.tanh(self.pooler(first))))


class Dense(ShardedModule):
    """A small linear layer, held by every tensor rank: [..., i] -> [..., o]."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, name: str, in_features: int, out_features: int, *, gradient: GradientKind = "complete"):
        super().__init__()
        for part, shape in (("weight", (out_features, in_features)), ("bias", (out_features,))):
            self.declare(part, ShardSpec((Block(f"{name}.{part}", shape),), gradient=gradient), tp_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class VocabularyBias(ShardedModule):
    """One number for each token, cut as the vocabulary is: [..., v/tp] -> [..., v/tp]."""

    weight: nn.Parameter

    def __init__(self, block: Block, axis: Axis):
        super().__init__()
        self.declare("weight", ShardSpec((replace(block, global_shape=block.global_shape[:1]),), dim=0), axis.size)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.weight


class BertLosses(NamedTuple):
    """Sums over a micro-batch, in nats: of masked tokens, and of sentences, one of each sample."""

    tokens: Tensor
    sentences: Tensor


def bert_losses(
    logits: BertLogits,
    labels: Tensor,
    loss_mask: Tensor,
    is_random: Tensor,
    axis: Axis,
    *,
    vocab_size: int,
    compile: bool = False,
) -> BertLosses:
    """Consumes the logits. labels, loss_mask: [b, s], 1 where a token is to be restored; is_random: int64 [b]."""
    per_token = vocab_parallel_cross_entropy(logits.tokens, labels.t(), axis, vocab_size=vocab_size, compile=compile)
    mask, two = loss_mask.t(), logits.next_sentence
    sentences = F.cross_entropy(two.float() if two.dtype.itemsize < 4 else two, is_random, reduction="sum")
    # A label that does not count may have any loss, so it is left out, not multiplied by zero.
    return BertLosses(torch.where(mask > 0, per_token * mask, 0.0).sum(), sentences)
