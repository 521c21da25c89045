"""Tiny models for the tests, one of each family, with weights that show every mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from megatron.core.random import DropoutStreams
from megatron.core.sharding import Region, fill
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig
from megatron.model.init import initial_value
from megatron.model.stage import Stage, StageOptions

# What each family's architecture adds to that of `tiny_config`; sizes and numbers that show in the function.
FAMILIES: Mapping[str, Mapping[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window_size": 5},
    "qwen2": {"qkv_bias": True, "tie_embed_logits": True, "rope_theta": 1e6},
    "qwen3": {"qk_layernorm": True, "kv_channels": 12, "rope_theta": 1e6},
    "gemma": {
        "glu_activation": "geglu_tanh",
        "apply_layernorm_1p": True,
        "scale_embeddings": True,
        "kv_channels": 12,
        "tie_embed_logits": True,
    },
    "falcon 7": {
        "num_attention_heads_kv": 1,
        "use_rms_norm": False,
        "glu_activation": None,
        "parallel_attn": True,
        "tie_embed_logits": True,
    },
    "falcon 40": {
        "use_rms_norm": False,
        "glu_activation": None,
        "parallel_attn": True,
        "parallel_layernorm": True,
        "tie_embed_logits": True,
    },
    "gpt2": {
        "num_attention_heads_kv": 8,
        "use_rms_norm": False,
        "glu_activation": None,
        "mlp_activation": "gelu_tanh",
        "position_embedding_type": "absolute",
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_embed_logits": True,
    },
}
BERT: Mapping[str, object] = {
    **FAMILIES["gpt2"],
    "mlp_activation": "gelu",
    "use_post_ln": True,
    "bidirectional": True,
    "num_token_types": 2,
    "embedding_layernorm": True,
    "bert_head": True,
}


def tiny_config(**overrides: object) -> ModelConfig:
    """8 heads, 2 key/value heads, 5 layers, an odd vocabulary: the model of the parity matrix."""
    values: dict[str, object] = {
        "num_layers": 5,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_attention_heads_kv": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 1031,
        "max_position_embeddings": 64,
        "use_rms_norm": True,
        "glu_activation": "swiglu",
        "position_embedding_type": "rotary",
        "tie_embed_logits": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,  # large enough that every nonlinearity matters
    }
    return ModelConfig(**{**values, **overrides})  # type: ignore[arg-type]


def serial_stage(config: ModelConfig, read: Callable[[Region], Tensor], *, dtype: torch.dtype = torch.float64) -> Stage:
    """The whole model on one rank, filled by `read`."""
    options = StageOptions(padded_vocab_size=config.vocab_size)
    stage = Stage(config, range(config.num_layers), is_first=True, is_last=True, axis=Axis("tp"), options=options)
    return fill_stage(stage.to(dtype), Axis("tp"), read)


def fill_stage(stage: Stage, axis: Axis, read: Callable[[Region], Tensor]) -> Stage:
    """Zeroes every parameter, then fills its regions."""
    specs = shard_specs(stage)
    for name, parameter in stage.named_parameters():
        nn.init.zeros_(parameter)
        fill(parameter, specs[name].regions(axis.rank, axis.size), read)
    return stage


def seeded(config: ModelConfig, seed: int = 1) -> Callable[[Region], Tensor]:
    """Reads initial weights. Norm weights and biases are made random too, so that a test would notice their loss."""

    def read(region: Region) -> Tensor:
        value = initial_value(config, seed, region)
        if len(region.size) == 1:
            generator = torch.Generator().manual_seed(len(region.name))
            whole = torch.randn(region.global_shape, generator=generator) * 0.1
            value = value + whole[region.global_slices]
        return value

    return read


def logits_of(stage: Stage, tokens: Tensor, streams: DropoutStreams | None = None) -> Tensor:
    """tokens: [b, s] -> logits [b, s, v] of a stage that is the whole model."""
    return stage(tokens, tokens.shape[1], None, streams).transpose(0, 1)
