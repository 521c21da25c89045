"""Published models: sizes against the parameter counts their authors state, and what a family fixes."""

from __future__ import annotations

import dataclasses

import pytest

from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.model.flops import num_parameters
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
    # The hub holds two copies of falcon-7b's tied matrix; it is one.
    ("falcon", "7"): 6_921_720_704,
    ("falcon", "40"): 41_303_293_952,
    ("mistral", "7"): 7_241_732_096,
    ("mistral", "7-v0.2"): 7_241_732_096,
    ("mistral", "7-v0.3"): 7_248_023_552,
    ("gpt2", "0.124"): 124_439_808,
    ("gpt2", "0.355"): 354_823_168,
    ("gpt2", "0.774"): 774_030_080,
    ("gpt2", "1.5"): 1_557_611_200,
    ("qwen2", "0.5"): 494_032_768,
    ("qwen2", "1.5"): 1_543_714_304,
    ("qwen2", "7"): 7_615_616_512,
    ("qwen2", "72"): 72_706_203_648,
    ("qwen2", "2.5-0.5"): 494_032_768,
    ("qwen2", "2.5-1.5"): 1_543_714_304,
    ("qwen2", "2.5-3"): 3_085_938_688,
    ("qwen2", "2.5-7"): 7_615_616_512,
    ("qwen2", "2.5-14"): 14_770_033_664,
    ("qwen2", "2.5-32"): 32_763_876_352,
    ("qwen2", "2.5-72"): 72_706_203_648,
    ("qwen3", "0.6"): 596_049_920,
    ("qwen3", "1.7"): 1_720_574_976,
    ("qwen3", "4"): 4_022_468_096,
    ("qwen3", "8"): 8_190_735_360,
    ("qwen3", "14"): 14_768_307_200,
    ("qwen3", "32"): 32_762_123_264,
    ("gemma", "2"): 2_506_172_416,
    ("gemma", "7"): 8_537_680_896,
    # With both heads of pretraining.
    ("bert", "base"): 110_106_428,
    ("bert", "large"): 336_226_108,
    ("bert", "base-cased"): 108_932_934,
    ("bert", "large-cased"): 334_661_958,
}


def count_parameters(c: ModelConfig) -> int:
    h, f, d = c.hidden_size, c.ffn_hidden_size, c.kv_channels
    q, kv, matrices = c.num_attention_heads * d, c.num_attention_heads_kv * d, 3 if c.glu_activation else 2
    norm = h if c.use_rms_norm else 2 * h
    layer = (2 * q + 2 * kv) * h + matrices * f * h
    layer += (q + 2 * kv) * c.qkv_bias + h * c.attention_output_bias + ((matrices - 1) * f + h) * c.mlp_bias
    layer += norm * (2 if c.parallel_layernorm or not c.parallel_attn else 1) + 2 * d * c.qk_layernorm
    if c.bert_head:
        heads = 2 * (h * h + h) + norm + c.vocab_size + 2 * h + 2
        return (c.vocab_size + c.max_position_embeddings + 2) * h + norm + c.num_layers * layer + heads
    positions = c.max_position_embeddings * h if c.position_embedding_type == "absolute" else 0
    num_vocabulary_matrices = 1 if c.tie_embed_logits else 2
    return num_vocabulary_matrices * c.vocab_size * h + positions + c.num_layers * layer + norm


def test_every_preset_has_the_published_number_of_parameters():
    assert {key: count_parameters(config) for key, config in PRESETS.items()} == PARAMETERS


def test_the_product_counts_as_many():
    assert {key: num_parameters(config) for key, config in PRESETS.items()} == PARAMETERS


# What small or large models of a family set against the others.
EXCEPTIONS = {
    "llama3": {"tie_embed_logits"},
    "qwen2": {"tie_embed_logits", "layernorm_epsilon"},
    "qwen3": {"tie_embed_logits"},
    "mistral": {"rope_theta"},
}


def test_every_preset_agrees_with_what_its_family_fixes_but_for_known_exceptions():
    differing: dict[str, set[str]] = {}
    for (model_name, _), config in PRESETS.items():
        fixed = family_defaults(model_name).items()
        differing.setdefault(model_name, set()).update(name for name, value in fixed if getattr(config, name) != value)
    known = {
        model_name: EXCEPTIONS.get(model_name, set()) & set(family_defaults(model_name)) for model_name in differing
    }
    assert differing == known


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
        ("falcon", "7", 2048, 1e-5, 1e4, None),
        ("falcon", "40", 2048, 1e-5, 1e4, None),
        ("mistral", "7", 32768, 1e-5, 1e4, None),
        ("mistral", "7-v0.3", 32768, 1e-5, 1e6, None),
        ("gpt2", "1.5", 1024, 1e-5, 1e4, None),
        ("qwen2", "7", 131072, 1e-6, 1e6, None),
        ("qwen2", "2.5-0.5", 32768, 1e-6, 1e6, None),
        ("qwen2", "2.5-14", 131072, 1e-5, 1e6, None),
        ("qwen3", "8", 40960, 1e-6, 1e6, None),
        ("gemma", "7", 8192, 1e-6, 1e4, None),
        ("bert", "large", 512, 1e-12, 1e4, None),
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


def test_only_the_oldest_families_train_with_dropout_unless_asked():
    rates = {(name, config.hidden_dropout, config.attention_dropout) for (name, _), config in PRESETS.items()}
    assert {name for name, *dropouts in rates if dropouts != [0.0, 0.0]} == {"gpt2", "bert"}
    assert {("gpt2", 0.1, 0.1), ("bert", 0.1, 0.1)} <= rates


def test_only_the_first_mistral_has_a_window():
    windows = {key: config.sliding_window_size for key, config in PRESETS.items() if config.sliding_window_size}
    assert windows == {("mistral", "7"): 4096}


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
            "--model_name xyz is unknown; use one of gpt, llama, llama2, codellama, llama3, falcon, mistral, gpt2, "
            "qwen2, qwen3, gemma, bert.",
        ),
    ],
)
def test_an_unknown_model_is_answered_with_those_there_are(call, message):
    with pytest.raises(ConfigError) as error:
        call()
    assert str(error.value) == message
