"""Every family as `transformers` computes it, in float64, with the weights that our tiny models have."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.sharding import Region
from megatron.model.config import ModelConfig, RopeScaling

LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
FALCON_NAMES = {
    "input_layernorm": "attention_norm",
    "ln_attn": "attention_norm",
    "ln_mlp": "mlp_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attention.dense": "attention.output",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
GPT2_NAMES = {
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.c_proj": "attention.output",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
BERT_NAMES = {
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "output.LayerNorm": "mlp_norm",
}
BERT_ENDS = {
    "bert.embeddings.word_embeddings": "embedding.word",
    "bert.embeddings.position_embeddings": "embedding.position",
    "bert.embeddings.token_type_embeddings": "embedding.token_type",
    "bert.embeddings.LayerNorm": "embedding.norm",
    "bert.pooler.dense": "pooler",
    "cls.predictions.transform.dense": "head.transform",
    "cls.predictions.transform.LayerNorm": "head.norm",
    "cls.predictions": "head",
    "cls.predictions.decoder": "head",
    "cls.seq_relationship": "next_sentence",
}
ENDS = {
    "model.embed_tokens.weight": "embedding.word.weight",
    "model.norm.weight": "final_norm.weight",
    "lm_head.weight": "head.weight",
    "transformer.word_embeddings.weight": "embedding.word.weight",
    "transformer.wte.weight": "embedding.word.weight",
    "transformer.wpe.weight": "embedding.position.weight",
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
}


@dataclass(frozen=True)
class TheirModel:
    """`logical` turns (name, tensor) of one of its parameters into views of the logical tensors inside."""

    module: nn.Module
    logical: Callable[[str, Tensor], Mapping[str, Tensor]]

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: view
            for parameter_name, parameter in self.module.named_parameters()
            for name, view in self.logical(parameter_name, parameter.grad).items()
        }


def transformers_model(family: str, config: ModelConfig, read: Callable[[Region], Tensor]) -> TheirModel:
    """The family's model with the weights that `read` gives for the logical tensors.

    transformers computes some norms in float32 whatever the model's type, and keeps Gemma's factor so; these are
    replaced, so that the comparison is between two computations in float64.
    """
    module: nn.Module = _MAKERS[family](config).double().eval()
    for part in module.modules():
        if type(part).__name__ == "GemmaRMSNorm":
            part.forward = _gemma_norm_in_its_own_type.__get__(part)
        elif type(part).__name__.endswith("RMSNorm"):
            part.forward = _norm_in_its_own_type.__get__(part)
        elif type(part).__name__ == "GemmaTextScaledWordEmbedding":
            part.embed_scale = torch.tensor(math.sqrt(config.hidden_size), dtype=torch.float64)
    views = {"falcon": _falcon_views, "gpt2": _gpt2_views, "bert": _bert_views}.get(family, _llama_views)
    theirs = TheirModel(module, lambda name, tensor: views(config, name, tensor))
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            for name, view in theirs.logical(parameter_name, parameter).items():
                shape = logical_shape(config, name, view)
                view.copy_(read(Region(name, shape, (0,) * len(shape), shape, (0,) * len(shape))).view(view.shape))
    return theirs


def logical_shape(config: ModelConfig, name: str, view: Tensor) -> tuple[int, ...]:
    """A view may have its heads apart."""
    if name.endswith(("norm.weight", ".bias")):
        return (view.numel(),)
    return (view.numel() // view.shape[-1], view.shape[-1])


def _llama_views(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name in ENDS:
        return {ENDS[name]: tensor}
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    ours = next(mine for mine, theirs in LLAMA_NAMES.items() if theirs == part)
    return {f"layers.{layer}.{ours}.{kind}": tensor}


def _falcon_views(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """`query_key_value` holds, for each key/value head, its query heads, its key and its value."""
    if name in ENDS:
        return {ENDS[name]: tensor}
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    if part in FALCON_NAMES:
        return {f"layers.{layer}.{FALCON_NAMES[part]}.{kind}": tensor}
    grouped = tensor.unflatten(0, (config.num_attention_heads_kv, -1, config.kv_channels))
    parts = {"q": grouped[:, :-2], "k": grouped[:, -2:-1], "v": grouped[:, -1:]}
    return {f"layers.{layer}.attention.{head}.{kind}": view for head, view in parts.items()}


def _gpt2_views(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Its matrices are [inputs, outputs]."""
    if name in ENDS:
        return {ENDS[name]: tensor}
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    tensor = tensor.t()
    if part in GPT2_NAMES:
        return {f"layers.{layer}.{GPT2_NAMES[part]}.{kind}": tensor}
    return {f"layers.{layer}.attention.{head}.{kind}": view for head, view in zip("qkv", tensor.chunk(3), strict=True)}


def _bert_views(config: ModelConfig, name: str, tensor: Tensor) -> dict[str, Tensor]:
    part, kind = name.rsplit(".", 1)
    if part in BERT_ENDS:
        return {f"{BERT_ENDS[part]}.{kind}": tensor}
    _, _, _, layer, part = part.split(".", 4)
    return {f"layers.{layer}.{BERT_NAMES[part]}.{kind}": tensor}


def _sizes(config: ModelConfig) -> dict[str, Any]:
    """What the Llama-like families spell alike."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= _rope_parameters(config.rope_scaling)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads_kv,
        "head_dim": config.kv_channels,
        "rms_norm_eps": config.layernorm_epsilon,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embed_logits,
        "rope_parameters": rope,
        "attn_implementation": "sdpa",
        # Token 0 would have no gradient in the embedding.
        "pad_token_id": None,
    }


def _llama(config: ModelConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return LlamaForCausalLM(LlamaConfig(**_sizes(config), **biases))


def _mistral(config: ModelConfig) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_sizes(config), sliding_window=config.sliding_window_size))


def _qwen2(config: ModelConfig) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**_sizes(config)))


def _qwen3(config: ModelConfig) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_sizes(config)))


def _gemma(config: ModelConfig) -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_sizes(config), hidden_act="gelu_pytorch_tanh"))


def _falcon(config: ModelConfig) -> nn.Module:
    """The architecture of 40B where the MLP has a norm of its own, or there are several key/value heads."""
    from transformers import FalconConfig, FalconForCausalLM

    is_new = config.num_attention_heads_kv > 1
    return FalconForCausalLM(
        FalconConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads_kv,
            new_decoder_architecture=is_new,
            num_ln_in_parallel_attn=2 if config.parallel_layernorm else 1,
            multi_query=True,
            parallel_attn=config.parallel_attn,
            bias=config.qkv_bias,
            layer_norm_epsilon=config.layernorm_epsilon,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embed_logits,
            attn_implementation="sdpa",
        )
    )


def _gpt2(config: ModelConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.hidden_size,
            n_inner=config.ffn_hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_attention_heads,
            n_positions=config.max_position_embeddings,
            layer_norm_epsilon=config.layernorm_epsilon,
            activation_function={"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.mlp_activation],
            attn_implementation="sdpa",
        )
    )


def _bert(config: ModelConfig) -> nn.Module:
    from transformers import BertConfig, BertForPreTraining

    return BertForPreTraining(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.num_token_types,
            layer_norm_eps=config.layernorm_epsilon,
            tie_word_embeddings=config.tie_embed_logits,
            pad_token_id=None,
            attn_implementation="sdpa",
        )
    )


_MAKERS: Mapping[str, Callable[[ModelConfig], nn.Module]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "bert": _bert,
}


def _norm_in_its_own_type(self: nn.Module, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _gemma_norm_in_its_own_type(self: nn.Module, x: Tensor) -> Tensor:
    return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


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
