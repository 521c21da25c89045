"""config.json <-> ModelConfig: both spellings, the defaults of transformers, and nothing dropped in silence."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_folders import LLAMA3_ROPE, SIZES, VARIANTS
from megatron.checkpoint.hf_config import hf_config, model_config_from_hf
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig, RopeScaling
from megatron.model.presets import PRESETS, preset

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}

# config.json of Llama-2-70b and of Llama-3.2-1B as transformers 4 wrote them.
LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def as_transformers_5_writes_it(config: dict) -> dict:
    return AutoConfig.for_model(**config).to_dict()


def through_transformers(config: dict) -> dict:
    loaded = LlamaConfig(**config).to_dict()
    return {key: value for key, value in loaded.items() if key not in ("transformers_version", "_name_or_path")}


@pytest.mark.parametrize(("config", "published"), [(LLAMA_2_70B, ("llama2", "70")), (LLAMA_32_1B, ("llama3", "3.2-1"))])
def test_published_files_are_the_presets_in_either_spelling(config, published):
    assert model_config_from_hf(config) == preset(*published)
    rewritten = as_transformers_5_writes_it(config)
    assert "rope_parameters" in rewritten and "rope_theta" not in rewritten
    assert model_config_from_hf(rewritten) == preset(*published)


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, None),
        ({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 4}}, 5.0, RopeScaling("linear", 4.0)),
        ({"rope_scaling": {"rope_type": "default"}}, 10000.0, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9.0, None),
        # The dictionary counts before the top level, and the older dictionary before the newer one.
        ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9.0, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            10000.0,
            RopeScaling("linear", 2.0),
        ),
        ({"rope_parameters": LLAMA3_ROPE}, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),
        # Without an original context transformers takes the context of the model.
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
            10000.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, SIZES["max_position_embeddings"]),
        ),
    ],
)
def test_rope_is_read_as_transformers_reads_it(rope, theta, scaling):
    ours = model_config_from_hf({**LLAMA, **rope})
    assert (ours.rope_theta, ours.rope_scaling) == (theta, scaling)
    theirs = LlamaConfig(**json.loads(json.dumps({**LLAMA, **rope}))).rope_parameters
    assert theirs["rope_theta"] == theta
    assert theirs["rope_type"] == (scaling.type if scaling else "default")
    for name in ("factor", "original_max_position_embeddings"):
        if scaling is not None and name in theirs:
            assert getattr(scaling, name) == theirs[name]


def test_keys_that_old_files_lack_have_the_defaults_of_transformers():
    optional = ("num_key_value_heads", "head_dim", "rms_norm_eps")
    sparse = {key: value for key, value in LLAMA.items() if key not in optional}
    theirs, ours = LlamaConfig(**sparse), model_config_from_hf(sparse)
    assert ours.num_attention_heads_kv == theirs.num_key_value_heads == 6
    assert ours.kv_channels == theirs.head_dim == 6
    assert ours.layernorm_epsilon == theirs.rms_norm_eps
    assert ours.tie_embed_logits == theirs.tie_word_embeddings
    assert ours.attention_dropout == theirs.attention_dropout
    assert ours.init_method_std == theirs.initializer_range
    assert (ours.qkv_bias, ours.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert ours.hidden_dropout == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; convert one of llama, "),
        ({"model_type": ...}, "model_type None is not supported; convert one of llama, "),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "architectures ['LlamaForSequenceClassification'] is not supported; use a LlamaForCausalLM, with its head.",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "the weights are quantized (gptq); use the model in bf16, fp16 or fp32.",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported for llama; use silu or swish."),
        ({"hidden_size": ...}, "hidden_size is missing; restore the model's own config.json."),
        ({"vocab_size": "many"}, "vocab_size is 'many', not a positive integer; restore the model's own config.json."),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive integer; restore the model's own config."),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a number; restore the model's own config.json."),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4', not a number; restore the model's own config.json."),
        ({"mlp_bias": 1}, "mlp_bias is 1, not true or false; restore the model's own config.json."),
        ({"num_key_value_heads": 4}, "--num_attention_heads 6 is not a multiple of --num_attention_heads_kv 4"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling of type 'dynamic' is not supported; use a model with linear or llama3 scaling.",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters of type 'yarn' is not supported; use a model with linear or llama3 scaling.",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            "rope_scaling of type 'llama3' lacks low_freq_factor, high_freq_factor; add them.",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' lacks factor; add them."),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling of type 'linear' lacks factor; add them."),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters that differs between layers is not supported; use a model with linear or llama3 scaling.",
        ),
        *(
            (
                {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": context}},
                f"original_max_position_embeddings is {context!r}, not a positive integer; restore the model's own ",
            )
            for context in (None, "16", 0, True)
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 is not supported; use a model that rotates whole heads.",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor 0.25 is not supported; use a model that rotates whole heads.",
        ),
    ],
)
def test_what_cannot_be_read_faithfully_is_an_error_that_names_it(changes, message):
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    with pytest.raises(CheckpointError) as error:
        model_config_from_hf(config, "/models/x/config.json")
    assert str(error.value).startswith("/models/x/config.json: " + message)


def test_activation_has_two_names():
    assert model_config_from_hf({**LLAMA, "hidden_act": "swish"}) == model_config_from_hf(LLAMA)


@pytest.mark.parametrize("key", PRESETS, ids="-".join)
def test_a_config_written_for_a_preset_means_that_preset_to_us_and_to_transformers(key):
    model = PRESETS[key]
    written = json.loads(json.dumps(hf_config(model, dtype=torch.bfloat16, model_name=key[0])))
    assert model_config_from_hf(written) == model
    assert model_config_from_hf(as_transformers_5_writes_it(written)) == model
    assert AutoConfig.for_model(**written).dtype == torch.bfloat16


def test_a_written_config_has_the_spelling_that_both_versions_read():
    written = hf_config(preset("llama3", "3.1-8"))
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_parameters" not in written


def test_special_tokens_of_a_model_born_here_reach_transformers():
    written = hf_config(preset("llama2", "7"), special_tokens={"eos_token_id": 7})
    assert LlamaConfig(**written).eos_token_id == 7


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_original_is_given_back_as_it_was(variant):
    original = {**LlamaConfig(**{**SIZES, **VARIANTS[variant]}).to_dict(), "added_by_somebody": [1, 2]}
    assert hf_config(model_config_from_hf(original), original) == original


@pytest.mark.parametrize("original", [LLAMA_2_70B, LLAMA_32_1B, as_transformers_5_writes_it(LLAMA_32_1B)])
@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 32007},
        {"tie_embed_logits": True, "max_position_embeddings": 99},
        {"rope_theta": 1234.0},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"rope_scaling": None},
    ],
    ids=lambda change: "+".join(change),
)
def test_a_changed_model_changes_the_original_only_where_it_says_something_else(original, change):
    model = dataclasses.replace(model_config_from_hf(original), **change)
    written = hf_config(model, original)
    assert model_config_from_hf(written) == model
    assert model_config_from_hf(as_transformers_5_writes_it(written)) == model
    rope = {"rope_theta", "rope_scaling", "rope_parameters"}
    expected = {**original, "tie_word_embeddings": model.tie_embed_logits, "vocab_size": model.vocab_size}
    expected["max_position_embeddings"] = model.max_position_embeddings
    assert {k: v for k, v in written.items() if k not in rope} == {k: v for k, v in expected.items() if k not in rope}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_what_followed_from_a_key_that_changed_is_written_out(spelling):
    """Without an original context the scaling is of the model's own, which a longer context must not move."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = {**LLAMA, spelling: rope}
    longer = dataclasses.replace(model_config_from_hf(original), max_position_embeddings=128)
    written = hf_config(longer, original)
    assert longer.rope_scaling.original_max_position_embeddings == 64
    assert model_config_from_hf(written) == longer
    assert model_config_from_hf(as_transformers_5_writes_it(written)) == longer


def test_numbers_of_heads_that_followed_from_another_are_written_out():
    """8 key/value heads of 6 for 8 heads; for 16 heads, 16 of 3 would follow, and for 32, nothing that is whole."""
    sparse = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
    original = {**sparse, "hidden_size": 48, "num_attention_heads": 8}
    for num_heads in (16, 32):
        model = dataclasses.replace(model_config_from_hf(original), num_attention_heads=num_heads)
        written = hf_config(model, original)
        assert model_config_from_hf(written) == model
        assert (written["num_key_value_heads"], written["head_dim"]) == (8, 6)


def test_an_original_context_beside_the_dictionary_counts_as_in_a_model_of_transformers():
    """What its config says at first is no measure: the model moves the outer number into the dictionary."""
    rope = {**LLAMA3_ROPE, "original_max_position_embeddings": 16}
    config = {**LLAMA, "rope_scaling": rope, "original_max_position_embeddings": 32}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config)))).inv_freq
    ours = model_config_from_hf(config)
    for context in (16, 32):
        alone = {**LLAMA, "rope_scaling": {**rope, "original_max_position_embeddings": context}}
        frequencies = LlamaRotaryEmbedding(LlamaConfig(**alone)).inv_freq
        assert torch.equal(theirs, frequencies) == (ours == model_config_from_hf(alone)) == (context == 32)


def test_training_settings_that_the_format_lacks_do_not_hinder_an_export():
    trained = dataclasses.replace(model_config_from_hf(LLAMA_2_70B), hidden_dropout=0.1)
    assert hf_config(trained, LLAMA_2_70B) == LLAMA_2_70B


def test_the_dtype_of_the_weights_is_stated_under_the_key_that_is_there():
    model = model_config_from_hf(LLAMA)
    assert hf_config(model, {**LLAMA, "torch_dtype": "float16"}, dtype=torch.bfloat16)["torch_dtype"] == "bfloat16"
    rewritten = hf_config(model, {**LLAMA, "dtype": "float16"}, dtype=torch.float32)
    assert rewritten["dtype"] == "float32" and "torch_dtype" not in rewritten


def test_a_model_that_no_supported_family_computes_is_refused_with_every_reason():
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    model = ModelConfig(**sizes, max_position_embeddings=32, use_rms_norm=True, glu_activation="reglu")
    with pytest.raises(CheckpointError) as error:
        hf_config(model, LLAMA)
    message = str(error.value)
    assert "llama comes nearest" in message and message.endswith("keep the checkpoint in the native format.")
    for reason in (
        "glu_activation is 'reglu', there 'swiglu'",
        "position_embedding_type is 'absolute', there 'rotary'",
    ):
        assert reason in message


def test_biases_that_transformers_couples_cannot_be_written_apart():
    model = dataclasses.replace(model_config_from_hf(LLAMA), attention_output_bias=True)
    with pytest.raises(CheckpointError, match="qkv_bias is False, there True"):
        hf_config(model)
