"""The part of the model that one pipeline stage holds: some layers, and the embedding or the head at the ends.

Legend: s sequence, b micro-batch, h hidden, v padded vocabulary, tp tensor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from megatron.core.random import DropoutStreams
from megatron.core.recompute import RecomputePolicy
from megatron.core.topology import Axis
from megatron.model.attention_kernels import AttentionKernel, AttentionPattern, SegmentLengths, sdpa_attention
from megatron.model.bert import BertHead, BertLogits
from megatron.model.block import TransformerLayer
from megatron.model.config import ModelConfig
from megatron.model.embedding import Embedding
from megatron.model.head import Head
from megatron.model.rope import RotaryEmbedding


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
    [s, b, v/tp], or `BertLogits`. A stage may be first and last. Tied embeddings on two stages are two copies
    of one logical tensor, of which the first stage is the owner.
    """

    def __init__(
        self, config: ModelConfig, layers: range, *, is_first: bool, is_last: bool, axis: Axis, options: StageOptions
    ):
        super().__init__()
        self.config, self.is_first, self.is_last = config, is_first, is_last
        self.recompute, self.is_compiled = options.recompute, options.compile
        # On one tensor rank the sequence is whole, and sequence parallelism the identity.
        sequence_parallel = options.sequence_parallel and axis.size > 1
        ends = (config, axis, sequence_parallel, options.padded_vocab_size)
        self.embedding = Embedding(*ends, compile=options.compile) if is_first else None
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
        head_type = BertHead if config.bert_head else Head
        self.head = head_type(*ends, self.embedding, compile=options.compile) if is_last else None
        is_rotary = config.position_embedding_type == "rotary"
        self.pattern = AttentionPattern(not config.bidirectional, window=config.sliding_window_size)
        self.rope = RotaryEmbedding(config.kv_channels, config.rope_theta, config.rope_scaling) if is_rotary else None

    def forward(
        self,
        x: Tensor,
        seq_length: int,
        position_ids: Tensor | None = None,
        streams: DropoutStreams | None = None,
        *,
        segment_ids: Tensor | None = None,
        segment_lengths: SegmentLengths | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor | BertLogits:
        """`seq_length` is s, also where x holds a part of it. No `streams`: no dropout.

        position_ids, segment_ids, token_types: [b, s]; None: 0, 1, 2, ..., one segment in a row, type 0. Tokens attend
        to their own segment; where segments are runs, segment_lengths says how long each of a row's is.
        """
        if self.embedding is not None:
            x = self.embedding(x, position_ids, token_types, streams)
        rotary = None if self.rope is None else self.rope.table(seq_length, position_ids, x)
        pattern = self.pattern
        if segment_ids is not None:
            pattern = replace(pattern, segment_ids=segment_ids, segment_lengths=segment_lengths)
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
