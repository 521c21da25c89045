"""Tiny models of every family with random weights, saved by transformers as users' folders are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Odd sizes: no dimension equals another, so that a swapped pair of tensors cannot go unnoticed.
SIZES = {
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 131,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-6,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 scaling": {"rope_parameters": LLAMA3_ROPE},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 7777.0}},
    "multi-head": {"num_key_value_heads": 6, "head_dim": 6, "attention_dropout": 0.25, "initializer_range": 0.1},
}


# As many heads as four tensor ranks can share, fewer key/value heads than that; no two other sizes are alike.
_ENDS = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8}
_LLAMA_LIKE = {
    **_ENDS,
    "intermediate_size": 52,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-6,
    "rope_theta": 7777.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON = {**_ENDS, "max_position_embeddings": 64, "layer_norm_epsilon": 3e-6, "rope_theta": 7777.0}
_GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 4, "n_head": 8, "n_positions": 64, "layer_norm_epsilon": 3e-6}

# Every block that a family was published with, and every choice its config.json has.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA_LIKE, "head_dim": 10},
    "llama 3.2": {"model_type": "llama", **_LLAMA_LIKE, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_LLAMA_LIKE, "head_dim": 10, "sliding_window": 7},
    "mistral without window": {"model_type": "mistral", **_LLAMA_LIKE, "sliding_window": None},
    "falcon 7b": {"model_type": "falcon", **_FALCON, "ffn_hidden_size": 52},
    "falcon 40b": {"model_type": "falcon", **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon 11b": {
        "model_type": "falcon",
        **_FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
    },
    "falcon sequential": {
        "model_type": "falcon",
        **_FALCON,
        "parallel_attn": False,
        "multi_query": False,
        "bias": True,
    },
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt2 untied": {
        "model_type": "gpt2",
        **_GPT2,
        "n_inner": 52,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
    },
    "qwen2": {"model_type": "qwen2", **_LLAMA_LIKE, "tie_word_embeddings": True},
    "qwen2 window": {
        "model_type": "qwen2",
        **_LLAMA_LIKE,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", **_LLAMA_LIKE, "head_dim": 10},
    "qwen3 tied": {
        "model_type": "qwen3",
        **_LLAMA_LIKE,
        "head_dim": 10,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "gemma": {"model_type": "gemma", **_LLAMA_LIKE, "head_dim": 10, "num_key_value_heads": 1},
    "gemma untied": {"model_type": "gemma", **_LLAMA_LIKE, "head_dim": 10, "tie_word_embeddings": False},
    "bert": {
        "model_type": "bert",
        **_ENDS,
        "intermediate_size": 52,
        "max_position_embeddings": 64,
        "type_vocab_size": 3,
    },
}


def save_family(
    folder: Path,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    std: float = 1.0,
    **overrides: Any,
) -> Path:
    """The model `name` of `FAMILIES`, as `save_llama` saves its own."""
    config = AutoConfig.for_model(**{**FAMILIES[name], **overrides})
    _save(_class_of(name).from_config(config), folder, dtype, max_shard_size, std)
    return folder


def load_family(name: str, folder: Path, **options: Any) -> Any:
    """The model in `folder` as transformers loads it."""
    return _class_of(name).from_pretrained(folder, **options)


def save_llama(
    folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", std: float = 1.0, **overrides: Any
) -> Path:
    """A Llama whose every tensor is random: norms and biases too, which transformers starts at one and zero.

    With a standard deviation of 1 every softmax is nearly a choice; compare functions with a smaller one.
    """
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides}))
    _save(model, folder, dtype, max_shard_size, std)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; `...` removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def loaded_config(folder: Path) -> dict[str, Any]:
    """What transformers makes of the folder's config.json, but for what it adds about itself."""
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}


def _class_of(name: str) -> type[AutoModelForCausalLM] | type[AutoModelForPreTraining]:
    """With both heads for a BERT."""
    return AutoModelForPreTraining if FAMILIES[name]["model_type"] == "bert" else AutoModelForCausalLM


def _save(model: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: str, std: float) -> None:
    torch.manual_seed(0)
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
