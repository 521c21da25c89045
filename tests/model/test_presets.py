"""Published models: sizes against the parameter counts their authors state, and what a family fixes."""

from __future__ import annotations

import dataclasses

import pytest

from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.model.presets import MODEL_NAMES, PRESETS, family_defaults, hub_name, model_sizes, preset

# Exact numbers of parameters, as the hub's pages of the published weights count them.
PARAMETERS = {
    ("llama", "7"): 6_738_415_616,
    ("llama", "13"): 13_015_864_320,
    ("llama", "30"): 32_528_943_616,
    ("llama", "65"): 65_285_660_672,
    ("llama2", "7"): 6_738_415_616,
    ("llama2", "13"): 13_015_864_320,
    ("llama2", "70"): 68_976_648_192,
    ("codellama", "7"): 6_738_546_688,
    ("codellama", "13"): 13_016_028_160,
    ("codellama", "34"): 33_743_970_304,
    ("llama3", "8"): 8_030_261_248,
    ("llama3", "70"): 70_553_706_496,
    ("llama3", "405"): 405_853_388_800,
    ("llama3", "3.1-8"): 8_030_261_248,
    ("llama3", "3.1-70"): 70_553_706_496,
    ("llama3", "3.1-405"): 405_853_388_800,
    ("llama3", "3.2-1"): 1_235_814_400,
    ("llama3", "3.2-3"): 3_212_749_824,
}


def count_parameters(c: ModelConfig) -> int:
    attention = (2 * c.num_attention_heads + 2 * c.num_attention_heads_kv) * c.kv_channels * c.hidden_size
    layer = attention + 3 * c.hidden_size * c.ffn_hidden_size + 2 * c.hidden_size
    num_vocabulary_matrices = 1 if c.tie_embed_logits else 2
    return num_vocabulary_matrices * c.vocab_size * c.hidden_size + c.num_layers * layer + c.hidden_size


def test_every_preset_has_the_published_number_of_parameters():
    assert {key: count_parameters(config) for key, config in PRESETS.items()} == PARAMETERS


def test_every_preset_agrees_with_what_its_family_fixes_but_for_the_tied_small_models():
    for (model_name, size), config in PRESETS.items():
        fixed = family_defaults(model_name)
        if size.startswith("3.2"):
            assert fixed.pop("tie_embed_logits") is False
            assert config.tie_embed_logits
        assert {name: getattr(config, name) for name in fixed} == fixed


@pytest.mark.parametrize(
    ("model_name", "size", "context", "epsilon", "theta", "factor"),
    [
        ("llama", "65", 2048, 1e-6, 1e4, None),
        ("llama2", "70", 4096, 1e-5, 1e4, None),
        ("codellama", "34", 16384, 1e-5, 1e6, None),
        ("llama3", "8", 8192, 1e-5, 5e5, None),
        ("llama3", "405", 131072, 1e-5, 5e5, 8.0),
        ("llama3", "3.1-70", 131072, 1e-5, 5e5, 8.0),
        ("llama3", "3.2-3", 131072, 1e-5, 5e5, 32.0),
    ],
)
def test_numbers_that_do_not_show_in_the_parameter_count_are_the_published_ones(
    model_name, size, context, epsilon, theta, factor
):
    config = preset(model_name, size)
    assert (config.max_position_embeddings, config.layernorm_epsilon, config.rope_theta) == (context, epsilon, theta)
    if factor is None:
        assert config.rope_scaling is None
    else:
        assert config.rope_scaling is not None
        assert dataclasses.astuple(config.rope_scaling) == ("llama3", factor, 1.0, 4.0, 8192)


def test_no_family_trains_with_dropout_unless_asked():
    assert all(config.hidden_dropout == config.attention_dropout == 0.0 for config in PRESETS.values())


def test_family_defaults_make_a_model_from_sizes_given_one_by_one():
    sizes = {"num_layers": 5, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 1031}
    config = ModelConfig(**{**family_defaults("llama2"), **sizes, "max_position_embeddings": 32})
    assert config.use_rms_norm and config.glu_activation == "swiglu" and not config.tie_embed_logits
    assert family_defaults("gpt") == {}


def test_every_published_size_names_its_repository():
    assert hub_name("llama2", "70") == "meta-llama/Llama-2-70b-hf"
    for model_name in MODEL_NAMES:
        assert all(hub_name(model_name, size).count("/") == 1 for size in model_sizes(model_name))


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["llama", "7"] = PRESETS["llama", "13"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("llama2", "8"), "--size 8: llama2 was not published in this size; use one of 7, 13, 70."),
        (
            lambda: preset("gpt", "7"),
            "--size 7: gpt was not published in this size; give --num_layers, --hidden_size and so on.",
        ),
        (lambda: preset("lama2", "7"), "--model_name lama2 is unknown; did you mean llama2?"),
        (
            lambda: family_defaults("xyz"),
            "--model_name xyz is unknown; use one of gpt, llama, llama2, codellama, llama3.",
        ),
    ],
)
def test_an_unknown_model_is_answered_with_those_there_are(call, message):
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value) == message
