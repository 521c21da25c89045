"""Meta's params.json -> `ModelConfig`.

The file leaves some things open: the vocabulary (the tensors say it), and the factor of the stretched rotary
frequencies and the context length, which Meta's programs had as constants (the published model of these sizes says
them).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig, RopeScaling
from megatron.model.presets import PRESETS

PARAMS_FILE: Final = "params.json"

_FAMILIES: Final = ("llama", "llama2", "codellama", "llama3", "mistral")
_UNSUPPORTED: Final = ("quantization_args", "lora_args", "moe", "moe_args")
_SIZES: Final = ("num_layers", "hidden_size", "num_attention_heads", "num_attention_heads_kv", "ffn_hidden_size")
# The feed-forward width of a gated MLP with as many weights as a plain one of width 4h, rounded up to this.
_DEFAULT_MULTIPLE: Final = 256
# What tells the generations apart.
_LLAMA3_VOCABULARY: Final = 128_000
_CODELLAMA_THETA: Final = 1e6
_LLAMA_EPSILON: Final = 1e-6


def read_params(file: Path) -> dict[str, Any]:
    """The content of a params.json. Raises CheckpointError if there is none or it cannot be used."""
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror}); it says the sizes of the model: put it beside the weights."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(params, dict):
        raise CheckpointError(f"{file} holds no JSON object; download it again.")
    if unsupported := [key for key in _UNSUPPORTED if params.get(key)]:
        raise CheckpointError(
            f"{file}: {unsupported[0]} is not supported; use a dense model in bf16, fp16 or fp32 without adapters."
        )
    _integer(params, "dim", file)
    return params


def model_config_from_params(
    params: Mapping[str, Any], file: Path, *, vocab_size: int, tied: bool, family: str | None = None
) -> ModelConfig:
    """The architecture that `params`, the content of `file`, describes, of a model with `vocab_size` tokens.

    `family` ("llama2") decides the context length, which no weight depends on; by default it is concluded from what
    tells the generations apart. Raises CheckpointError naming the key that is missing or wrong.
    """
    if family not in (None, *_FAMILIES):
        raise CheckpointError(
            f"{file} describes no {family}: Meta's format is that of {', '.join(_FAMILIES)}; give one."
        )
    declared = params.get("vocab_size", -1)
    if declared not in (-1, vocab_size):
        raise CheckpointError(
            f"{file}: vocab_size is {declared}, but the embeddings have {vocab_size} rows; correct it."
        )
    dim, heads = _integer(params, "dim", file), _integer(params, "n_heads", file)
    fields: dict[str, Any] = {
        "num_layers": _integer(params, "n_layers", file),
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_attention_heads_kv": _integer(params, "n_kv_heads", file, heads),
        "kv_channels": _integer(params, "head_dim", file, dim // heads),
        "ffn_hidden_size": _integer(params, "hidden_dim", file, _ffn_hidden_size(params, dim, file)),
        "layernorm_epsilon": _number(params, "norm_eps", file, 1e-5),
        "rope_theta": _number(params, "rope_theta", file, 10000.0),
        "sliding_window_size": params.get("sliding_window"),
        "vocab_size": vocab_size,
        "tie_embed_logits": tied,
    }
    is_stretched = bool(params.get("use_scaled_rope"))
    published = _published(fields, "llama3" if is_stretched else family or _generation(fields), is_stretched)
    fields["max_position_embeddings"] = _integer(params, "max_seq_len", file, published.max_position_embeddings)
    fields["rope_scaling"] = published.rope_scaling and _scaling(params, published.rope_scaling, file)
    try:
        return ModelConfig(
            **fields,
            use_rms_norm=True,
            glu_activation="swiglu",
            position_embedding_type="rotary",
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _generation(fields: Mapping[str, Any]) -> str:
    """The family that a model's numbers point to, for what params.json leaves open."""
    if fields["sliding_window_size"] is not None:
        return "mistral"
    if fields["vocab_size"] >= _LLAMA3_VOCABULARY:
        return "llama3"
    if fields["rope_theta"] == _CODELLAMA_THETA:
        return "codellama"
    return "llama" if fields["layernorm_epsilon"] <= _LLAMA_EPSILON else "llama2"


def _published(fields: Mapping[str, Any], family: str, is_stretched: bool) -> ModelConfig:
    """The published model of these sizes, else any of its family: they agree in what is taken from it."""
    candidates = [
        model
        for (name, _), model in PRESETS.items()
        if name == family and (model.rope_scaling is not None) == is_stretched
    ]
    same_sizes = [model for model in candidates if all(getattr(model, size) == fields[size] for size in _SIZES)]
    return (same_sizes or candidates)[0]


def _scaling(params: Mapping[str, Any], published: RopeScaling, file: Path) -> RopeScaling:
    factor = _number(params, "rope_scaling_factor", file, published.factor)
    return dataclasses.replace(published, factor=factor)


def _ffn_hidden_size(params: Mapping[str, Any], dim: int, file: Path) -> int:
    multiple = _integer(params, "multiple_of", file, _DEFAULT_MULTIPLE)
    width = int(_number(params, "ffn_dim_multiplier", file, 1.0) * int(2 * 4 * dim / 3))
    return -(-width // multiple) * multiple


def _integer(params: Mapping[str, Any], key: str, file: Path, default: int | None = None) -> int:
    value = params.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        found = "missing" if value is None else f"{value!r}, which is no positive integer"
        raise CheckpointError(f"{file}: {key} is {found}; restore the file that came with the weights.")
    return value


def _number(params: Mapping[str, Any], key: str, file: Path, default: float) -> float:
    value = params.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or value <= 0:
        raise CheckpointError(
            f"{file}: {key} is {value!r}, which is no positive number; restore the file that came with the weights."
        )
    return float(value)
