"""config.json of every family: published files are the presets, and what changes the function is never overlooked."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from transformers import AutoConfig

from hf_folders import FAMILIES
from megatron.checkpoint.hf_config import hf_config, model_config_from_hf
from megatron.errors import CheckpointError
from megatron.model.presets import preset

# What the files on the hub say about the model, in the spelling they were published in.
FALCON_7B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}
FALCON_40B = {
    **FALCON_7B,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
BERT_BASE = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
PUBLISHED = {
    ("falcon", "7"): FALCON_7B,
    ("falcon", "40"): FALCON_40B,
    ("gpt2", "0.124"): GPT2,
    ("mistral", "7"): MISTRAL_7B,
    ("mistral", "7-v0.2"): {**MISTRAL_7B, "rope_theta": 1e6, "sliding_window": None},
    ("qwen2", "2.5-7"): QWEN25_7B,
    ("qwen3", "0.6"): QWEN3_06B,
    ("gemma", "2"): GEMMA_2B,
    ("bert", "base"): BERT_BASE,
}


@pytest.mark.parametrize(("published", "config"), PUBLISHED.items(), ids=map("-".join, PUBLISHED))
def test_published_files_are_the_presets_in_either_spelling(published, config):
    assert model_config_from_hf(config) == preset(*published)
    assert model_config_from_hf(AutoConfig.for_model(**config).to_dict()) == preset(*published)


@pytest.mark.parametrize(("published", "config"), PUBLISHED.items(), ids=map("-".join, PUBLISHED))
def test_a_published_file_is_given_back_as_it_was(published, config):
    assert hf_config(model_config_from_hf(config), config) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_larger_vocabulary_is_the_only_change(name):
    original = json.loads(json.dumps(AutoConfig.for_model(**FAMILIES[name]).to_dict()))
    model = dataclasses.replace(model_config_from_hf(original), vocab_size=139)
    assert hf_config(model, original) == {**original, "vocab_size": 139}


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma", "falcon", "gpt2", "bert"])
def test_keys_that_a_file_lacks_have_the_defaults_of_the_family(model_type):
    """Compared with what transformers says when it fills the gaps itself."""
    names = {"gpt2": ("n_embd", "n_layer", "n_head", "n_positions")}.get(
        model_type, ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    )
    sizes = dict(zip(names, (4096, 2, 32, 99), strict=True))
    sparse = {"model_type": model_type, "vocab_size": 7, "intermediate_size": 11, **sizes}
    filled = AutoConfig.for_model(**sparse).to_dict()
    assert model_config_from_hf(sparse) == model_config_from_hf(filled)


def test_names_that_transformers_takes_for_another_are_read():
    model = model_config_from_hf(FALCON_7B)
    assert model_config_from_hf({**without(FALCON_7B, "hidden_size"), "n_embed": 4544}) == model
    named = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 1024}
    spelled = {**without(GPT2, "n_embd", "n_layer", "n_head", "n_positions"), **named}
    assert model_config_from_hf(spelled) == model_config_from_hf(GPT2)


def test_a_key_that_changes_leaves_no_other_name_of_it_behind():
    """transformers takes the other name where both are there."""
    spelled = {**without(GPT2, "n_positions"), "max_position_embeddings": 1024}
    longer = dataclasses.replace(model_config_from_hf(spelled), max_position_embeddings=2048)
    assert hf_config(longer, spelled) == {**GPT2, "n_positions": 2048}
    assert AutoConfig.for_model(**hf_config(longer, spelled)).n_positions == 2048
    named = {**without(FALCON_7B, "hidden_size"), "n_embed": 4544}
    narrow = dataclasses.replace(model_config_from_hf(named), hidden_size=2272, num_attention_heads=71, kv_channels=32)
    assert AutoConfig.for_model(**hf_config(narrow, named)).hidden_size == 2272


@pytest.mark.parametrize(
    ("config", "changes", "window"),
    [
        (MISTRAL_7B, {"sliding_window": ...}, 4096),
        (MISTRAL_7B, {"sliding_window": 77}, 77),
        (MISTRAL_7B, {"sliding_window": None}, None),
        (QWEN25_7B, {}, None),
        (QWEN25_7B, {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 77}, 77),
        (QWEN25_7B, {"use_sliding_window": True, "max_window_layers": 28, "sliding_window": 77}, None),
        (QWEN25_7B, {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, None),
        (QWEN3_06B, {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": ...}, 4096),
        # The kinds of the layers count before their number.
        (
            QWEN3_06B,
            {"use_sliding_window": True, "sliding_window": 77, "layer_types": ["sliding_attention"] * 28},
            77,
        ),
        (
            QWEN3_06B,
            {
                "use_sliding_window": True,
                "sliding_window": 77,
                "max_window_layers": 0,
                "layer_types": ["full_attention"] * 28,
            },
            None,
        ),
    ],
)
def test_a_sliding_window_is_read_as_transformers_reads_it(config, changes, window):
    changed = edited(config, changes)
    model = model_config_from_hf(changed)
    assert model.sliding_window_size == window
    rewritten = AutoConfig.for_model(**changed).to_dict()
    assert model_config_from_hf(rewritten).sliding_window_size == window
    born = hf_config(model, model_name=config["model_type"])
    assert model_config_from_hf(AutoConfig.for_model(**born).to_dict()) == model


@pytest.mark.parametrize("spelling", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("original", [MISTRAL_7B, QWEN25_7B], ids=["mistral", "qwen2"])
@pytest.mark.parametrize("window", [None, 33])
def test_a_changed_window_replaces_every_key_that_speaks_of_it(original, window, spelling):
    original = original if spelling == "transformers 4" else AutoConfig.for_model(**original).to_dict()
    model = dataclasses.replace(model_config_from_hf(original), sliding_window_size=window)
    written = hf_config(model, original)
    assert model_config_from_hf(written) == model
    assert model_config_from_hf(AutoConfig.for_model(**written).to_dict()) == model


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({"new_decoder_architecture": True}, {"num_attention_heads_kv": 71, "parallel_layernorm": True}),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, {"num_attention_heads_kv": 71}),
        ({"multi_query": False}, {"num_attention_heads_kv": 71}),
        ({"parallel_attn": False}, {"parallel_attn": False}),
        ({"parallel_attn": False, "multi_query": False}, {"parallel_attn": False, "num_attention_heads_kv": 71}),
        ({"bias": True}, {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}),
        ({"tie_word_embeddings": False}, {"tie_embed_logits": False}),
        ({"activation": "gelu_pytorch_tanh"}, {"mlp_activation": "gelu_tanh"}),
    ],
    ids=str,
)
def test_every_falcon_block_is_told_apart_and_written_again(changes, differences):
    model = dataclasses.replace(model_config_from_hf(FALCON_7B), **differences)
    assert model_config_from_hf({**FALCON_7B, **changes}) == model
    assert model_config_from_hf(hf_config(model, model_name="falcon")) == model
    assert model_config_from_hf(hf_config(model, FALCON_7B)) == model


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (FALCON_7B, {"alibi": True}, "alibi True is not supported for falcon; use false or null."),
        (
            FALCON_7B,
            {"activation": "relu"},
            "activation 'relu' is not supported for falcon; use gelu or gelu_python or ",
        ),
        (
            FALCON_40B,
            {"parallel_attn": False},
            "parallel_attn False is not supported for falcon; use true.",
        ),
        (
            FALCON_7B,
            {"num_ln_in_parallel_attn": 2},
            "num_ln_in_parallel_attn 2 is not supported for falcon; use null or 1.",
        ),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights False is not supported for gpt2; use true."),
        (
            GPT2,
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx True is not supported for gpt2; use false.",
        ),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention True is not supported for gpt2; use false."),
        (
            GPT2,
            {"activation_function": "relu"},
            "activation_function 'relu' is not supported for gpt2; use gelu_new or gelu_pytorch_tanh or gelu.",
        ),
        (
            GPT2,
            {"architectures": ["GPT2DoubleHeadsModel"]},
            "architectures ['GPT2DoubleHeadsModel'] is not supported; use a GPT2LMHeadModel, with its head.",
        ),
        (
            GEMMA_2B,
            {"hidden_activation": "gelu"},
            "hidden_activation 'gelu' is not supported for gemma; use gelu_pytorch_tanh or gelu_new or null.",
        ),
        (
            GEMMA_2B,
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention True is not supported for gemma; use null or false.",
        ),
        (
            QWEN25_7B,
            {"use_sliding_window": True, "max_window_layers": 21, "sliding_window": 77},
            "layers of full_attention and sliding_attention with a window of 77 (layer_types, max_window_layers, "
            "sliding_window) are not supported; use a model whose layers all attend alike.",
        ),
        (
            QWEN3_06B,
            {"layer_types": ["full_attention"] * 27 + ["linear_attention"]},
            "layers of full_attention and linear_attention with a window of None (",
        ),
        (QWEN3_06B, {"layer_types": ["sliding_attention"] * 28}, "layers of sliding_attention with a window of None ("),
        (BERT_BASE, {"hidden_act": "relu"}, "hidden_act 'relu' is not supported for bert; use gelu or gelu_python."),
        (BERT_BASE, {"is_decoder": True}, "is_decoder True is not supported for bert; use false."),
        (BERT_BASE, {"tie_word_embeddings": False}, "tie_word_embeddings False is not supported for bert; use true."),
        (
            BERT_BASE,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported for bert; use absolute.",
        ),
        (
            MISTRAL_7B,
            {"sliding_window": 0},
            "sliding_window is 0, not a positive integer or null; restore the model's own config.json.",
        ),
        (
            QWEN25_7B,
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            "rope_scaling of type 'yarn' is not supported; use a model with linear or llama3 scaling.",
        ),
    ],
)
def test_what_cannot_be_read_faithfully_is_an_error_that_names_it(config, changes, message):
    with pytest.raises(CheckpointError) as error:
        model_config_from_hf(edited(config, changes), "/models/x/config.json")
    assert str(error.value).startswith("/models/x/config.json: " + message)


def test_a_family_is_kept_where_another_could_say_the_same():
    """Without window and biases a Mistral is a Llama."""
    model = dataclasses.replace(preset("mistral", "7"), sliding_window_size=None)
    assert hf_config(model)["model_type"] == "llama"
    assert hf_config(model, model_name="mistral")["architectures"] == ["MistralForCausalLM"]
    assert hf_config(preset("qwen2", "7"), model_name="mistral")["model_type"] == "qwen2"


def test_an_original_of_a_family_that_cannot_say_it_is_an_error():
    windowed = dataclasses.replace(model_config_from_hf(GPT2), sliding_window_size=9)
    with pytest.raises(CheckpointError, match=r"gpt2 comes nearest: sliding_window_size is 9, there None\)"):
        hf_config(windowed, GPT2)


def test_two_dropouts_that_are_one_here_are_kept_apart_in_the_file():
    original = {**GPT2, "embd_pdrop": 0.25, "resid_pdrop": 0.0}
    model = model_config_from_hf(original)
    assert model.hidden_dropout == 0.0
    assert hf_config(model, original) == original


def edited(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}
