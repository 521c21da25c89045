"""Tiny Llamas with random weights, saved by transformers as users' folders are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

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


def save_llama(
    folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", std: float = 1.0, **overrides: Any
) -> Path:
    """A Llama whose every tensor is random: norms and biases too, which transformers starts at one and zero.

    With a standard deviation of 1 every softmax is nearly a choice; compare functions with a smaller one.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **overrides})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; `...` removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def loaded_config(folder: Path) -> dict[str, Any]:
    """What transformers makes of the folder's config.json, but for what it adds about itself."""
    config = LlamaConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
