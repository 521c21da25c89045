"""A BERT's tree is the model that Megatron-LM computes from it, and other BERTs of Megatron-LM are refused by name."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_folders import load_family, save_family
from legacy_trees import BERT, Spelling, random_weights, write_tree
from megatron.checkpoint import open_source
from megatron.checkpoint.hf_export import plan_export
from megatron.checkpoint.legacy import LegacySource, plan_legacy_tree, write_legacy_tree
from megatron.checkpoint.legacy.recording import beyond_megatron_llm
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.unpickle import read_torch_file
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError

TP2_PP2 = ParallelLayout(tp=2, pp=2)
# With weights of this size attention is no choice of one position, and logits are small numbers.
STD = 0.15


def ignore(num_bytes: int) -> None:
    pass


def rank_states(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(pipeline rank, tensor rank) -> what its file holds."""
    files = folder.glob("mp_rank_*/model_optim_rng.pt")
    return {
        (int(p or 0), int(t)): read_torch_file(file)
        for file in files
        for t, _, p in [file.parent.name.removeprefix("mp_rank_").partition("_")]
    }


def linear(x: Tensor, held: list[dict[str, Tensor]], key: str, *, cut: int | None) -> Tensor:
    """`cut` is the dimension along which the tensor ranks, whose tensors are `held`, share the weight."""
    weights, biases = ([each[f"{key}.{leaf}"] for each in held] for leaf in ("weight", "bias"))
    weight = weights[0] if cut is None else torch.cat(weights, dim=cut)
    return F.linear(x, weight, torch.cat(biases) if cut == 0 else biases[0])


def norm(x: Tensor, held: dict[str, Tensor], key: str, epsilon: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], held[f"{key}.weight"], held[f"{key}.bias"], epsilon)


def layer_of_megatron_lm(x: Tensor, held: list[dict[str, Tensor]], layer: str, args: Any) -> Tensor:
    """x: [b, s, h]. A residual connection is taken behind each norm: the argument of the tree's name says so."""
    assert args.apply_residual_connection_post_layernorm and not args.bias_gelu_fusion
    n, d = args.num_attention_heads, args.kv_channels
    normed = norm(x, held[0], f"{layer}.input_layernorm", args.layernorm_epsilon)
    fused = linear(normed, held, f"{layer}.self_attention.query_key_value", cut=0)
    q, k, v = fused.unflatten(-1, (n, 3, d)).permute(3, 0, 2, 1, 4)  # each [b, n, s, d]
    context = (q @ k.mT / d**0.5).softmax(-1) @ v
    attended = linear(context.transpose(1, 2).flatten(2), held, f"{layer}.self_attention.dense", cut=1)
    behind = norm(normed + attended, held[0], f"{layer}.post_attention_layernorm", args.layernorm_epsilon)
    wide = F.gelu(linear(behind, held, f"{layer}.mlp.dense_h_to_4h", cut=0))
    return behind + linear(wide, held, f"{layer}.mlp.dense_4h_to_h", cut=1)


def logits_of_megatron_lm(folder: Path, tokens: Tensor, token_types: Tensor) -> tuple[Tensor, Tensor]:
    """[b, s, v] and [b, 2]: what Megatron-LM computes of the tree, by the names of its tensors."""
    states = rank_states(folder)
    pp, tp = (max(numbers) + 1 for numbers in zip(*states, strict=True))
    args = states[0, 0]["args"]
    per_rank = [[states[p, t]["model"] for t in range(tp)] for p in range(pp)]
    first, last = per_rank[0], per_rank[-1]
    embedding = [model["language_model"]["embedding"] for model in first]
    x = F.embedding(tokens, torch.cat([held["word_embeddings"]["weight"] for held in embedding]))
    x = x + embedding[0]["position_embeddings"]["weight"][: tokens.shape[1]]
    x = x + F.embedding(token_types, embedding[0]["tokentype_embeddings"]["weight"])
    for models in per_rank:
        held = [model["language_model"]["encoder"] for model in models]
        for number in range(args.num_layers // pp):
            x = layer_of_megatron_lm(x, held, f"layers.{number}", args)
    x = norm(x, last[0]["language_model"]["encoder"], "final_layernorm", args.layernorm_epsilon)
    head = [model["lm_head"] for model in last]
    transformed = norm(F.gelu(linear(x, head, "dense", cut=None)), head[0], "layernorm", args.layernorm_epsilon)
    projection = torch.cat([model["word_embeddings_for_head"]["weight"] for model in last])
    of_tokens = F.linear(transformed, projection, torch.cat([held["bias"] for held in head]))
    pooled = torch.tanh(linear(x[:, 0], [last[0]["language_model"]["pooler"]], "dense", cut=None))
    two = F.linear(pooled, last[0]["binary_head"]["weight"], last[0]["binary_head"]["bias"])
    return of_tokens[..., : args.vocab_size], two


def test_megatron_lm_computes_from_a_tree_what_transformers_computes(tmp_path):
    original = save_family(tmp_path / "hf", "bert", std=STD)
    folder = write_legacy_tree(plan_legacy_tree(open_source(original), TP2_PP2), tmp_path / "tree")
    generator = torch.Generator().manual_seed(3)
    tokens, types = (torch.randint(n, (2, 24), generator=generator) for n in (131, 3))
    with torch.no_grad():
        expected = load_family("bert", original).eval()(tokens, token_type_ids=types)
    of_tokens, two = logits_of_megatron_lm(folder, tokens, types)
    assert 0.1 < expected.prediction_logits.abs().max() < 10
    torch.testing.assert_close(of_tokens, expected.prediction_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(two, expected.seq_relationship_logits, rtol=0, atol=1e-5)


def test_what_has_to_be_said_to_megatron_lm_is_recorded_and_logged(tmp_path, caplog):
    source = open_source(save_family(tmp_path / "hf", "bert", type_vocab_size=2))
    with caplog.at_level(logging.WARNING):
        folder = write_legacy_tree(plan_legacy_tree(source, TP2_PP2), tmp_path / "tree")
    args = rank_states(folder)[1, 1]["args"]
    assert args.apply_residual_connection_post_layernorm is True
    assert (args.bert_binary_head, args.openai_gelu, args.bias_gelu_fusion) == (True, False, False)
    assert (args.layernorm_epsilon, args.position_embedding_type) == (1e-12, "learned_absolute")
    assert (args.tokenizer_type, args.vocab_file) == ("BertWordPieceLowerCase", None)
    assert (
        "release is a BERT of Megatron-LM, which has to be told: --apply-residual-connection-post-layernorm "
        "--layernorm-epsilon 1e-12 --no-bias-gelu-fusion, and in later versions --use-legacy-models"
    ) in caplog.text
    assert "does not compute" not in caplog.text


def test_a_wordpiece_vocabulary_with_capitals_is_recorded_as_such(tmp_path):
    original = save_family(tmp_path / "hf", "bert")
    (original / "vocab.txt").write_text("[UNK]\nword\n")
    (original / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    folder = write_legacy_tree(plan_legacy_tree(open_source(original), ParallelLayout()), tmp_path / "tree")
    args = rank_states(folder)[0, 0]["args"]
    assert (args.tokenizer_type, args.vocab_file) == ("BertWordPieceCase", str((original / "vocab.txt").absolute()))


def test_the_bias_of_tokens_that_are_padding_is_the_last_tokens(tmp_path):
    """131 tokens, padded to 256: tensor rank 1 holds those from 128 on."""
    original = save_family(tmp_path / "hf", "bert")
    plan = plan_legacy_tree(open_source(original), ParallelLayout(tp=2))
    states = rank_states(write_legacy_tree(plan, tmp_path / "tree"))
    bias = states[0, 1]["model"]["lm_head"]["bias"]
    assert bias.shape == (128,)
    assert torch.equal(bias[3:], bias[2].expand(125))
    assert not torch.equal(bias[1], bias[2])


def test_models_that_megatron_lm_does_not_know_are_named():
    assert beyond_megatron_llm(dataclasses.replace(BERT, kv_channels=5)) == []
    other = dataclasses.replace(BERT, num_token_types=3, tie_embed_logits=False, glu_activation="geglu")
    assert beyond_megatron_llm(other) == ["3 token types", "a BERT with an untied head", "a BERT with geglu"]


def test_a_gated_bert_has_its_gate_where_megatron_lm_has_it(tmp_path):
    model = dataclasses.replace(BERT, glu_activation="swiglu")
    weights = random_weights(model)
    theirs = Spelling(tp=2, gate_first=True, args={"swiglu": True})
    write_tree(tmp_path / "theirs", model, weights, theirs)
    source = open_source(tmp_path / "theirs")
    assert source.model_config() == model
    folder = write_legacy_tree(plan_legacy_tree(source, ParallelLayout(tp=2)), tmp_path / "ours")
    key = "layers.2.mlp.dense_h_to_4h.weight"
    ours, expected = (
        rank_states(root)[0, 1]["model"]["language_model"]["encoder"][key]
        for root in (folder, tmp_path / "theirs" / "iter_0000100")
    )
    assert torch.equal(ours, expected)
    again = open_source(tmp_path / "ours")
    for part in ("gate", "up"):
        name = f"layers.2.mlp.{part}.weight"
        assert torch.equal(again.read(f"model.{name}", (0, 0), weights[name].shape), weights[name])


def test_the_fused_kernel_approximates_gelu_in_the_layers_which_hugging_face_cannot_say(tmp_path):
    model = dataclasses.replace(BERT, mlp_activation="gelu_tanh")
    write_tree(tmp_path, model, random_weights(model), Spelling(tp=2, pp=2))
    source = open_source(tmp_path)
    assert source.model_config() == model
    with pytest.raises(CheckpointError, match="mlp_activation"):
        plan_export(source)


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes every file of the tree in `root`."""
    for file in root.rglob("*.pt"):
        state = torch.load(file, weights_only=False)
        change(state)
        torch.save(state, file)


def rename_norms(state: dict[str, Any]) -> None:
    encoder, head = state["model"]["language_model"]["encoder"], state["model"]["lm_head"]
    for held in (encoder, head):
        for key in [key for key in held if "layernorm" in key]:
            held[key.replace("layernorm", "norm")] = held.pop(key)


def test_later_versions_name_the_norm_of_the_head_without_its_kind(tmp_path):
    weights = random_weights(BERT)
    write_tree(tmp_path, BERT, weights, Spelling(tp=2))
    edit(tmp_path, rename_norms)
    source = LegacySource(tmp_path)
    assert source.model_config() == BERT
    for name in ("head.norm.weight", "embedding.norm.bias", "layers.3.mlp_norm.weight"):
        assert torch.equal(source.read(f"model.{name}", (0,), (20,)), weights[name])


def drop(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(state: dict[str, Any]) -> None:
        held = state["model"]
        for name in path[:-1]:
            held = held[name]
        held.pop(path[-1])

    return change


def set_argument(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda state: vars(state["args"]).update(values)


PRE_NORM = (
    "its BERT was trained without apply_residual_connection_post_layernorm: its norms come before attention and MLP, "
    "whose outputs are added to what is not normed"
)
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "norms before the blocks": (set_argument(apply_residual_connection_post_layernorm=False), PRE_NORM),
    "nothing is recorded about the norms": (
        lambda state: vars(state["args"]).pop("apply_residual_connection_post_layernorm"),
        PRE_NORM,
    ),
    "no binary head": (
        drop("binary_head"),
        "its BERT has no binary_head (--bert-no-binary-head), and so no pooler and no token types",
    ),
    "a core model": (
        lambda state: state["model"].update({"output_layer.bias": state["model"]["lm_head"].pop("bias")}),
        "its BERT is of Megatron-LM's core models, whose norms come before attention and MLP whatever "
        "apply_residual_connection_post_layernorm says",
    ),
    "no pooler": (drop("language_model", "pooler"), "pooler.dense.weight is missing in mp_rank_00"),
    "no token types": (
        drop("language_model", "embedding", "tokentype_embeddings"),
        "embedding.tokentype_embeddings.weight is missing in mp_rank_00",
    ),
    "an approximation in the head too": (
        set_argument(openai_gelu=True),
        "the model was trained with openai_gelu True, which is not supported",
    ),
    "norms around one": (
        set_argument(apply_layernorm_1p=True),
        "the model was trained with apply_layernorm_1p True, which is not supported",
    ),
    "the same by its other name": (
        set_argument(layernorm_zero_centered_gamma=True),
        "the model was trained with layernorm_zero_centered_gamma True, which is not supported",
    ),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_a_bert_that_is_another_model_or_not_whole_is_refused(tmp_path, change, message):
    write_tree(tmp_path, BERT, random_weights(BERT), Spelling(tp=2))
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        open_source(tmp_path)
    assert str(tmp_path) in str(raised.value)


HALF: dict[str, tuple[dict[str, Any], str]] = {
    "a decoder with norms behind": (
        {"bidirectional": False, "embedding_layernorm": False, "num_token_types": 0, "bert_head": False},
        "holds a model with use_post_ln and without bidirectional, embedding_layernorm, num_token_types, bert_head; "
        "a tree holds a decoder, which has none of these, or a BERT, which has all. Use --saver megatron.",
    ),
    "a BERT with norms before": (
        {"use_post_ln": False},
        "with bidirectional, embedding_layernorm, num_token_types, bert_head and without use_post_ln; a tree holds",
    ),
}


@pytest.mark.parametrize("changes, message", HALF.values(), ids=HALF)
def test_half_a_bert_is_no_tree(tmp_path, monkeypatch, changes, message):
    source = open_source(save_family(tmp_path / "hf", "bert"))
    model = dataclasses.replace(source.model_config(), **changes)
    monkeypatch.setattr(source, "model_config", lambda: model)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'hf'} ") + ".*" + re.escape(message)):
        plan_legacy_tree(source, TP2_PP2)


def test_a_tree_of_pretraining_goes_on_as_a_checkpoint_of_this_project(tmp_path):
    weights = random_weights(BERT, torch.bfloat16)
    write_tree(tmp_path / "tree", BERT, weights, Spelling(tp=2, pp=2, virtual=2))
    reshard(plan_resharding(open_source(tmp_path / "tree"), ParallelLayout(tp=2)), tmp_path / "native", on_bytes=ignore)
    source = open_source(tmp_path / "native")
    assert source.model_config() == BERT
    assert set(source.names()) == {f"model.{name}" for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(source.read(f"model.{name}", (0,) * tensor.ndim, tensor.shape), tensor), name
