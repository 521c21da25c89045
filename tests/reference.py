"""Tiny models for the tests: ours, and the same weights in `transformers` as an independent reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from megatron.core.random import DropoutStreams
from megatron.core.sharding import Region, fill
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig, RopeScaling
from megatron.model.init import initial_value
from megatron.model.stage import Stage, StageOptions

LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
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


def transformers_llama(config: ModelConfig, read: Callable[[Region], Tensor]) -> nn.Module:
    """A `transformers` Llama in float64 with the weights that `read` gives for the logical tensors.

    transformers computes its norms in float32 whatever the model's type; that one function is replaced, so
    that the comparison is between two computations in float64.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= _rope_parameters(config.rope_scaling)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads_kv,
            head_dim=config.kv_channels,
            rms_norm_eps=config.layernorm_epsilon,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_embed_logits,
            attention_bias=config.qkv_bias,
            mlp_bias=config.mlp_bias,
            rope_parameters=rope,
            attn_implementation="sdpa",
        )
    ).double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = _norm_in_its_own_type.__get__(module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            logical, shape = logical_name(name), tuple(parameter.shape)
            origin = (0,) * len(shape)
            parameter.copy_(read(Region(logical, shape, origin, shape, origin)))
    return model


def logical_name(llama_name: str) -> str:
    """The global name of the logical tensor that a Llama checkpoint of transformers calls `llama_name`."""
    fixed: Mapping[str, str] = {
        "model.embed_tokens.weight": "embedding.word.weight",
        "model.norm.weight": "final_norm.weight",
        "lm_head.weight": "head.weight",
    }
    if llama_name in fixed:
        return fixed[llama_name]
    _, _, layer, rest = llama_name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    ours = next(mine for mine, theirs in LLAMA_NAMES.items() if theirs == part)
    return f"layers.{layer}.{ours}.{kind}"


def logits_of(stage: Stage, tokens: Tensor, streams: DropoutStreams | None = None) -> Tensor:
    """tokens: [b, s] -> logits [b, s, v] of a stage that is the whole model."""
    return stage(tokens, tokens.shape[1], None, streams).transpose(0, 1)


def _norm_in_its_own_type(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _rope_parameters(scaling: RopeScaling) -> dict[str, object]:
    if scaling.type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
