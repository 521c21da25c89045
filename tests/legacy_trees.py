"""Trees as Megatron-LM and Megatron-LLM save them, made by explicit formulae from weights in the order of Hugging Face.

Nothing here is shared with the code under test.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.model.config import ModelConfig

Weights = dict[str, Tensor]

# Odd sizes: no dimension equals another, and a head is not hidden_size / heads wide.
_SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 20,
    "num_attention_heads": 4,
    "kv_channels": 6,
    "ffn_hidden_size": 28,
    "vocab_size": 131,
    "max_position_embeddings": 64,
}
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
LLAMA = ModelConfig(
    **_SIZES,
    **_NO_DROPOUT,
    num_attention_heads_kv=2,
    use_rms_norm=True,
    glu_activation="swiglu",
    position_embedding_type="rotary",
    rope_theta=7e4,
    tie_embed_logits=False,
)
MISTRAL = dataclasses.replace(LLAMA, sliding_window_size=16, rope_theta=1e4)
MULTI_HEAD = dataclasses.replace(LLAMA, num_attention_heads_kv=4)
FALCON_7B = ModelConfig(
    **_SIZES, **_NO_DROPOUT, num_attention_heads_kv=1, position_embedding_type="rotary", parallel_attn=True
)
FALCON_40B = dataclasses.replace(FALCON_7B, num_attention_heads_kv=2, parallel_layernorm=True)
GPT = ModelConfig(**_SIZES, qkv_bias=True, attention_output_bias=True, mlp_bias=True, mlp_activation="gelu_tanh")
GPT_ROTARY = dataclasses.replace(GPT, position_embedding_type="rotary", glu_activation="geglu", mlp_activation="gelu")
BERT = ModelConfig(
    **_SIZES,
    use_post_ln=True,
    bidirectional=True,
    embedding_layernorm=True,
    bert_head=True,
    num_token_types=2,
    layernorm_epsilon=1e-12,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
)

# The modules of a layer, in the order in which the programs register them.
_MODULES = (
    "input_layernorm",
    "mlp_layernorm",
    "self_attention.query_key_value",
    "self_attention.dense",
    "post_attention_layernorm",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


@dataclass(frozen=True)
class Spelling:
    """How a tree is written. `qkv` is the order of fused rows, `gate_first` that of gated MLPs."""

    tp: int = 1
    pp: int = 1
    virtual: int = 1
    names: str = "trainer"  # or "converter", "megatron_core"
    version: float = 3.0
    rotary_pairs: bool = True
    gate_first: bool = False
    padded: int = 256
    args: Mapping[str, Any] = field(default_factory=dict)


def random_weights(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Weights:
    """Every tensor of the model by its name, random."""
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in _shapes(model)}


def write_tree(
    root: Path, model: ModelConfig, weights: Weights, spelling: Spelling, *, name: str = "iter_0000100"
) -> Path:
    """Writes ``root/name`` and the tracker; returns the folder."""
    args = argparse.Namespace(**{**recorded_args(model, spelling), **spelling.args})
    for p in range(spelling.pp):
        for t in range(spelling.tp):
            folder = root / name / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if spelling.pp > 1 else ""))
            folder.mkdir(parents=True)
            state = {"args": args, "checkpoint_version": spelling.version, "iteration": 100}
            state |= rank_models(model, weights, spelling, p, t)
            torch.save(state, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release" if name == "release" else str(int(name[5:])))
    return root / name


def rank_models(model: ModelConfig, weights: Weights, spelling: Spelling, p: int, t: int) -> dict[str, Any]:
    """ "model", or "model0", "model1", ... of one rank."""
    models = {}
    for v, flat in enumerate(rank_tensors(model, weights, spelling, p, t)):
        models["model" if spelling.virtual == 1 else f"model{v}"] = _spelled(flat, spelling.names)
    return models


def rank_tensors(model: ModelConfig, weights: Weights, spelling: Spelling, p: int, t: int) -> list[Weights]:
    """What one rank holds of `weights` in each of its chunks, by the key of the trainer's spelling."""
    num_stages = spelling.pp * spelling.virtual
    per_chunk = model.num_layers // num_stages
    return [
        _chunk(model, weights, spelling, t, range(s * per_chunk, (s + 1) * per_chunk), s == 0, s == num_stages - 1)
        for s in range(p, num_stages, spelling.pp)
    ]


def recorded_args(model: ModelConfig, spelling: Spelling) -> dict[str, Any]:
    """What Megatron-LLM records, of a BERT what Megatron-LM does."""
    of_bert = {
        "apply_residual_connection_post_layernorm": True,
        "bert_binary_head": True,
        "position_embedding_type": "learned_absolute",
    }
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_attention_heads_kv": model.num_attention_heads_kv,
        "ffn_hidden_size": model.ffn_hidden_size,
        "kv_channels": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": model.max_position_embeddings,
        "use_rms_norm": model.use_rms_norm,
        "layernorm_epsilon": model.layernorm_epsilon,
        "glu_activation": model.glu_activation,
        "bias_gelu_fusion": model.mlp_activation == "gelu_tanh",
        "position_embedding_type": model.position_embedding_type,
        "rope_theta": model.rope_theta,
        "rope_scaling_factor": 1.0,
        "sliding_window_size": model.sliding_window_size,
        "parallel_attn": model.parallel_attn,
        "parallel_layernorm": model.parallel_layernorm,
        "use_bias": model.mlp_bias,
        "tie_embed_logits": model.tie_embed_logits,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_method_std,
        "padded_vocab_size": spelling.padded,
        "vocab_size": model.vocab_size,
        "tensor_model_parallel_size": spelling.tp,
        "pipeline_model_parallel_size": spelling.pp,
        "consumed_train_samples": 6400,
        "seed": 1234,
        **(of_bert if model.bert_head else {}),
    }


def _shapes(model: ModelConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    rows = {"q": model.num_attention_heads * d, "k": model.num_attention_heads_kv * d}
    rows["v"] = rows["k"]
    has_mlp_norm = not model.parallel_attn or model.parallel_layernorm
    yield "embedding.word.weight", (model.vocab_size, h)
    if model.position_embedding_type == "absolute":
        yield "embedding.position.weight", (model.max_position_embeddings, h)
    if model.bert_head:
        yield from _shapes_of_bert(model)
    norms = ["embedding.norm", "head.norm"] if model.bert_head else ["final_norm"]
    for i in range(model.num_layers):
        norms += [f"layers.{i}.attention_norm"] + [f"layers.{i}.mlp_norm"] * has_mlp_norm
        linears = {f"attention.{part}": (n, h, model.qkv_bias) for part, n in rows.items()}
        linears["attention.output"] = (h, rows["q"], model.attention_output_bias)
        for part in ("gate", "up") if model.glu_activation else ("up",):
            linears[f"mlp.{part}"] = (f, h, model.mlp_bias)
        linears["mlp.down"] = (h, f, model.mlp_bias)
        for name, (n, m, has_bias) in linears.items():
            yield f"layers.{i}.{name}.weight", (n, m)
            if has_bias:
                yield f"layers.{i}.{name}.bias", (n,)
    for name in norms:
        yield f"{name}.weight", (h,)
        if not model.use_rms_norm:
            yield f"{name}.bias", (h,)
    if not model.tie_embed_logits:
        yield "head.weight", (model.vocab_size, h)


def _shapes_of_bert(model: ModelConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    yield "embedding.token_type.weight", (model.num_token_types, model.hidden_size)
    yield "head.bias", (model.vocab_size,)
    for name, rows in (("pooler", model.hidden_size), ("head.transform", model.hidden_size), ("next_sentence", 2)):
        yield f"{name}.weight", (rows, model.hidden_size)
        yield f"{name}.bias", (rows,)


def _chunk(
    model: ModelConfig, weights: Weights, spelling: Spelling, t: int, layers: range, is_first: bool, is_last: bool
) -> Weights:
    tp, flat = spelling.tp, {}
    if is_first:
        flat["embedding.word_embeddings.weight"] = _padded(weights["embedding.word.weight"], spelling).chunk(tp)[t]
        if model.position_embedding_type == "absolute":
            flat["embedding.position_embeddings.weight"] = weights["embedding.position.weight"]
        if model.bert_head:
            flat["embedding.tokentype_embeddings.weight"] = weights["embedding.token_type.weight"]
    for local, i in enumerate(layers):
        own = {name.removeprefix(f"layers.{i}."): w for name, w in weights.items() if name.startswith(f"layers.{i}.")}
        if model.bert_head:
            own |= _norms_of_bert(weights, i)
        tensors = {leaf: _layer(model, own, spelling, leaf, t) for leaf in ("weight", "bias")}
        for module in _MODULES:
            for leaf in ("weight", "bias"):
                if (tensor := tensors[leaf].get(module)) is not None:
                    flat[f"encoder.layers.{local}.{module}.{leaf}"] = tensor
    if is_last:
        for leaf in ("weight",) if model.use_rms_norm else ("weight", "bias"):
            last = f"layers.{model.num_layers - 1}.mlp_norm" if model.bert_head else "final_norm"
            flat[f"encoder.final_layernorm.{leaf}"] = weights[f"{last}.{leaf}"]
        if model.bert_head:
            flat |= _heads_of_bert(weights, spelling, t)
        if not model.tie_embed_logits:
            flat["lm_head"] = _padded(weights["head.weight"], spelling).chunk(tp)[t]
        elif not is_first:
            table = _padded(weights["embedding.word.weight"], spelling).chunk(tp)[t]
            flat["word_embeddings_for_head.weight"] = table
    return {key: tensor.clone() for key, tensor in flat.items()}


def _norms_of_bert(weights: Weights, layer: int) -> Weights:
    """Each norm is stored with what reads it: that of the embedding, or of the MLP one layer down, with attention."""
    before = f"layers.{layer - 1}.mlp_norm" if layer else "embedding.norm"
    own = {f"attention_norm.{leaf}": weights[f"{before}.{leaf}"] for leaf in ("weight", "bias")}
    behind = f"layers.{layer}.attention_norm"
    return own | {f"mlp_norm.{leaf}": weights[f"{behind}.{leaf}"] for leaf in ("weight", "bias")}


def _heads_of_bert(weights: Weights, spelling: Spelling, t: int) -> Weights:
    bias = weights["head.bias"]
    padded = torch.cat([bias, bias[-1:].expand(spelling.padded - len(bias))])
    return {
        "pooler.dense.weight": weights["pooler.weight"],
        "pooler.dense.bias": weights["pooler.bias"],
        "lm_head.bias": padded.chunk(spelling.tp)[t],
        "lm_head.dense.weight": weights["head.transform.weight"],
        "lm_head.dense.bias": weights["head.transform.bias"],
        "lm_head.layernorm.weight": weights["head.norm.weight"],
        "lm_head.layernorm.bias": weights["head.norm.bias"],
        "binary_head.weight": weights["next_sentence.weight"],
        "binary_head.bias": weights["next_sentence.bias"],
    }


def _layer(model: ModelConfig, own: Weights, spelling: Spelling, leaf: str, t: int) -> dict[str, Tensor | None]:
    layer = {
        "input_layernorm": own.get(f"attention_norm.{leaf}"),
        "mlp_layernorm" if model.parallel_attn else "post_attention_layernorm": own.get(f"mlp_norm.{leaf}"),
        "self_attention.query_key_value": _qkv(model, own, spelling, leaf, t),
        "mlp.dense_h_to_4h": _up(own, spelling, leaf, t),
    }
    for theirs, ours in (("self_attention.dense", "attention.output"), ("mlp.dense_4h_to_h", "mlp.down")):
        tensor = own.get(f"{ours}.{leaf}")
        layer[theirs] = tensor.chunk(spelling.tp, dim=1)[t] if tensor is not None and leaf == "weight" else tensor
    return layer


def _padded(table: Tensor, spelling: Spelling) -> Tensor:
    """As the resharding tool of Megatron-LLM pads: by repeating the last row."""
    return torch.cat([table, table[-1:].expand(spelling.padded - len(table), -1)])


def _qkv(model: ModelConfig, own: Weights, spelling: Spelling, leaf: str, t: int) -> Tensor | None:
    if f"attention.q.{leaf}" not in own:
        return None
    d, n, kv = model.kv_channels, model.num_attention_heads, model.num_attention_heads_kv
    q, k, v = (own[f"attention.{part}.{leaf}"] for part in "qkv")
    if spelling.rotary_pairs and model.position_embedding_type == "rotary":
        q, k = _paired(q, d), _paired(k, d)
    tail = q.shape[1:]
    if spelling.version < 2 and n == kv:
        heads = [part.reshape(n, d, *tail).chunk(spelling.tp)[t] for part in (q, k, v)]
        fused = torch.stack(heads) if spelling.version == 0 else torch.stack(heads, dim=2)
        return fused.reshape(-1, *tail)
    groups = [q.reshape(kv, n // kv * d, *tail), k.reshape(kv, d, *tail), v.reshape(kv, d, *tail)]
    return torch.cat(groups, dim=1).reshape(-1, *tail).chunk(spelling.tp)[t]


def _paired(heads: Tensor, d: int) -> Tensor:
    """Hugging Face rotates dimension j with j + d/2; here they become neighbours, head by head."""
    return torch.cat([head.reshape(2, d // 2, -1).transpose(0, 1).reshape(head.shape) for head in heads.split(d)])


def _up(own: Weights, spelling: Spelling, leaf: str, t: int) -> Tensor | None:
    if f"mlp.up.{leaf}" not in own:
        return None
    parts = ["up"] + ["gate"] * (f"mlp.gate.{leaf}" in own)
    ordered = reversed(parts) if spelling.gate_first else parts
    return torch.cat([own[f"mlp.{part}.{leaf}"].chunk(spelling.tp)[t] for part in ordered])


def _spelled(flat: Weights, names: str) -> dict[str, Any]:
    if names == "megatron_core":
        return {_core_name(key): tensor for key, tensor in flat.items()}
    is_converter = names == "converter"
    language_model: dict[str, Any] = {}
    state: dict[str, Any] = {"language_model": language_model}
    for key, tensor in flat.items():
        if key == "lm_head":
            language_model[key] = tensor
        elif key.startswith("word_embeddings_for_head"):
            state["word_embeddings_for_head"] = {"weight": tensor}
        elif key.startswith(("lm_head.", "binary_head.", "pooler.")):
            module, leaf = key.split(".", 1)
            (language_model if module == "pooler" else state).setdefault(module, {})[leaf] = tensor
        elif key.startswith("embedding."):
            embedding = language_model.setdefault("embedding", {})
            _, table, leaf = key.split(".")
            if is_converter:
                embedding[f"{table}.{leaf}"] = tensor
            else:
                embedding.setdefault(table, {})[leaf] = tensor
        else:
            key = key.removeprefix("encoder.")
            key = key.replace("self_attention", "attention") if is_converter else key
            language_model.setdefault("transformer" if is_converter else "encoder", {})[key] = tensor
    return state


def _core_name(key: str) -> str:
    for ours, theirs in (
        ("encoder.", "decoder."),
        ("self_attention.query_key_value.", "self_attention.linear_qkv."),
        ("self_attention.dense.", "self_attention.linear_proj."),
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("post_attention_layernorm.", "mlp.linear_fc1.layer_norm_"),
        ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
        ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
    ):
        key = key.replace(ours, theirs)
    return "output_layer.weight" if key in ("lm_head", "word_embeddings_for_head.weight") else key
