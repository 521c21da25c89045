"""What a model configuration refuses, and what one means that was stored before a field existed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron.errors import ConfigError
from megatron.model.config import ModelConfig

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 11,
    "max_position_embeddings": 8,
}
# The fields of the first checkpoints ever written; all others must default to what those models computed.
FIRST_FIELDS = frozenset(
    "num_layers hidden_size num_attention_heads vocab_size max_position_embeddings num_attention_heads_kv "
    "ffn_hidden_size kv_channels use_rms_norm layernorm_epsilon glu_activation position_embedding_type rope_theta "
    "rope_scaling qkv_bias attention_output_bias mlp_bias tie_embed_logits hidden_dropout attention_dropout "
    "init_method_std".split()
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"hidden_size": 25},
            "--hidden_size 25 is not a multiple of --num_attention_heads 4; change one of them or give --kv_channels.",
        ),
        (
            {"num_attention_heads_kv": 3},
            "--num_attention_heads 4 is not a multiple of --num_attention_heads_kv 3; every key/value head serves the "
            "same number of query heads.",
        ),
        (
            {"parallel_layernorm": True},
            "--parallel_layernorm gives the MLP beside the attention a norm of its own, and without --parallel_attn "
            "they are not side by side; add it, or drop --parallel_layernorm.",
        ),
        (
            {"sliding_window_size": 0},
            "--sliding_window_size 0 leaves a token nothing to attend to; use 1 or more, or leave it out to attend to "
            "everything before.",
        ),
        (
            {"use_post_ln": True, "parallel_attn": True},
            "--use_post_ln has a norm between attention and MLP, and --parallel_attn puts them side by side; drop one "
            "of them.",
        ),
        (
            {"bidirectional": True, "sliding_window_size": 4},
            "--sliding_window_size 4 is a window on the past, and this model attends both ways; drop it.",
        ),
        (
            {"glu_activation": "swiglu", "mlp_activation": "gelu_tanh"},
            "--mlp_activation gelu_tanh is of an MLP without a gate, and --glu_activation is swiglu; drop one of them "
            "(geglu_tanh is the gated one).",
        ),
    ],
)
def test_what_no_model_can_have_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(**{**SIZES, **overrides})
    assert str(error.value) == message


def test_a_field_added_later_is_off_by_default() -> None:
    """So that a configuration stored without it means the same model."""
    config = ModelConfig(**SIZES)
    later = {f.name: getattr(config, f.name) for f in dataclasses.fields(ModelConfig) if f.name not in FIRST_FIELDS}
    assert later.pop("mlp_activation") == "gelu"
    assert not any(later.values())
