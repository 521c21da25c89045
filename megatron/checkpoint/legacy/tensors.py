"""Which tensors a rank's file holds, how they are cut over the tensor ranks, and which logical ones they are made of.

One description for both directions: the reader looks rows up in it, the writer fills them in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron.checkpoint.legacy.conventions import Conventions, gated_rows, head_rows, qkv_rows
from megatron.checkpoint.legacy.keys import EMBEDDING, HEAD, HEAD_COPY, HEAD_MODULE, TOKEN_TYPES, layer_key
from megatron.model.config import ModelConfig

Cut = Literal["rows", "columns", "copies"]


@dataclass(frozen=True)
class Part:
    """A logical tensor. `rows` says where each of its rows lies, counted over the tensors of all ranks.

    None: they lie in order, from row 0 on. `is_copy`: another stage's tensor holds the same values.
    """

    name: str
    rows: Tensor | None = None
    is_copy: bool = False


@dataclass(frozen=True)
class StoredTensor:
    """`shape` is that over all tensor ranks, which hold equal shares along rows or columns, or all of it each."""

    key: str
    cut: Cut
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def local_shape(self, tp: int) -> tuple[int, ...]:
        if self.cut == "rows":
            return (self.shape[0] // tp, *self.shape[1:])
        return (*self.shape[:-1], self.shape[-1] // tp) if self.cut == "columns" else self.shape


@dataclass(frozen=True)
class Chunk:
    """What one model chunk of a pipeline stage holds: these global layers, and the ends of the model."""

    layers: range
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class TreeModel:
    """A model as a tree stores it. `qkv_bias` and the like are the model's own fields."""

    model: ModelConfig
    conventions: Conventions
    tp: int
    padded_vocab_size: int

    def tensors(self, chunk: Chunk) -> list[StoredTensor]:
        """All tensors of a chunk."""
        return [*self._first(chunk), *self._layers(chunk), *self._last(chunk)]

    def _first(self, chunk: Chunk) -> Iterator[StoredTensor]:
        model = self.model
        if not chunk.is_first:
            return
        yield self._vocabulary(EMBEDDING, Part("embedding.word.weight"))
        if model.position_embedding_type == "absolute":
            shape = (model.max_position_embeddings, model.hidden_size)
            yield StoredTensor(
                "embedding.position_embeddings.weight", "copies", shape, (Part("embedding.position.weight"),)
            )
        if model.num_token_types:
            shape = (model.num_token_types, model.hidden_size)
            yield StoredTensor(TOKEN_TYPES, "copies", shape, (Part("embedding.token_type.weight"),))

    def _layers(self, chunk: Chunk) -> Iterator[StoredTensor]:
        # The rows of all layers are alike.
        tp, model, conventions = self.tp, self.model, self.conventions
        qkv = {part: qkv_rows(model, part, conventions, tp) for part in ("q", "k", "v")}
        up: dict[str, Tensor | None] = {"up": None}
        if model.glu_activation is not None:
            up = {part: gated_rows(model, part, conventions, tp) for part in ("gate", "up")}
        for local, layer in enumerate(chunk.layers):
            before_attention, before_mlp = self._norms_before(layer)
            yield from self._norm(layer_key(local, "input_layernorm"), before_attention)
            yield from self._attention(local, f"layers.{layer}", qkv)
            if not model.parallel_attn or model.parallel_layernorm:
                norm = "mlp_layernorm" if model.parallel_attn else "post_attention_layernorm"
                yield from self._norm(layer_key(local, norm), before_mlp)
            yield from self._mlp(local, f"layers.{layer}", up)

    def _norms_before(self, layer: int) -> tuple[str, str]:
        """Which norms lie before the attention and before the MLP of `layer`, counted from 0 to num_layers.

        Before the attention behind the last layer lies the last norm. See `bert` for norms behind the blocks.
        """
        if self.model.use_post_ln:
            return f"layers.{layer - 1}.mlp_norm" if layer else "embedding.norm", f"layers.{layer}.attention_norm"
        is_layer = layer < self.model.num_layers
        return f"layers.{layer}.attention_norm" if is_layer else "final_norm", f"layers.{layer}.mlp_norm"

    def _attention(self, local: int, layer: str, qkv: dict[str, Tensor]) -> Iterator[StoredTensor]:
        model = self.model
        heads, heads_kv, d = model.num_attention_heads, model.num_attention_heads_kv, model.kv_channels
        for leaf, tail in (("weight", (model.hidden_size,)), ("bias", ())):
            if leaf == "weight" or model.qkv_bias:
                parts = tuple(Part(f"{layer}.attention.{part}.{leaf}", rows) for part, rows in qkv.items())
                key = layer_key(local, f"self_attention.query_key_value.{leaf}")
                yield StoredTensor(key, "rows", ((heads + 2 * heads_kv) * d, *tail), parts)
        if model.qk_layernorm:
            rows = head_rows(model, self.conventions)
            for part in ("q", "k"):
                key = layer_key(local, f"self_attention.{part}_layernorm.weight")
                yield StoredTensor(key, "copies", (d,), (Part(f"{layer}.attention.{part}_norm.weight", rows),))
        yield from self._row_parallel(
            layer_key(local, "self_attention.dense"),
            f"{layer}.attention.output",
            heads * d,
            model.attention_output_bias,
        )

    def _mlp(self, local: int, layer: str, up: dict[str, Tensor | None]) -> Iterator[StoredTensor]:
        model = self.model
        for leaf, tail in (("weight", (model.hidden_size,)), ("bias", ())):
            if leaf == "weight" or model.mlp_bias:
                parts = tuple(Part(f"{layer}.mlp.{part}.{leaf}", rows) for part, rows in up.items())
                key = layer_key(local, f"mlp.dense_h_to_4h.{leaf}")
                yield StoredTensor(key, "rows", (len(up) * model.ffn_hidden_size, *tail), parts)
        yield from self._row_parallel(
            layer_key(local, "mlp.dense_4h_to_h"), f"{layer}.mlp.down", model.ffn_hidden_size, model.mlp_bias
        )

    def _last(self, chunk: Chunk) -> Iterator[StoredTensor]:
        if not chunk.is_last:
            return
        yield from self._norm("encoder.final_layernorm", self._norms_before(self.model.num_layers)[0])
        if self.model.bert_head:
            yield from self._bert_head()
        if not self.model.tie_embed_logits:
            yield self._vocabulary(HEAD, Part("head.weight"))
        elif not chunk.is_first:
            yield self._vocabulary(HEAD_COPY, Part("embedding.word.weight", is_copy=True))

    def _bert_head(self) -> Iterator[StoredTensor]:
        h = self.model.hidden_size
        yield from self._copied("pooler.dense", "pooler", h)
        yield StoredTensor(f"{HEAD_MODULE}bias", "rows", (self.padded_vocab_size,), (Part("head.bias"),))
        yield from self._copied(f"{HEAD_MODULE}dense", "head.transform", h)
        yield from self._norm(f"{HEAD_MODULE}layernorm", "head.norm")
        yield from self._copied("binary_head", "next_sentence", 2)

    def _vocabulary(self, key: str, part: Part) -> StoredTensor:
        return StoredTensor(key, "rows", (self.padded_vocab_size, self.model.hidden_size), (part,))

    def _copied(self, key: str, name: str, rows: int) -> Iterator[StoredTensor]:
        yield StoredTensor(f"{key}.weight", "copies", (rows, self.model.hidden_size), (Part(f"{name}.weight"),))
        yield StoredTensor(f"{key}.bias", "copies", (rows,), (Part(f"{name}.bias"),))

    def _norm(self, key: str, name: str) -> Iterator[StoredTensor]:
        for leaf in ("weight",) if self.model.use_rms_norm else ("weight", "bias"):
            yield StoredTensor(f"{key}.{leaf}", "copies", (self.model.hidden_size,), (Part(f"{name}.{leaf}"),))

    def _row_parallel(self, key: str, name: str, columns: int, has_bias: bool) -> Iterator[StoredTensor]:
        h = self.model.hidden_size
        yield StoredTensor(f"{key}.weight", "columns", (h, columns), (Part(f"{name}.weight"),))
        if has_bias:
            yield StoredTensor(f"{key}.bias", "copies", (h,), (Part(f"{name}.bias"),))
