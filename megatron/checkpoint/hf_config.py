"""Hugging Face's config.json <-> `ModelConfig`.

Read are the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`); whatever would
change the function and is not supported is an error. Written is the spelling of transformers 4 for a model born here,
since both versions read it, and the original with the least changes for a model that came from such a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch

from megatron.checkpoint.hf_rules import FAMILIES, ConfigKey, Family
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig, RopeScaling

_ROPE_KEYS: Final = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
_ROPE_NUMBERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
)
_DEFAULT_THETA: Final = 10000.0

# Training settings, which are not part of what a weight means: a format that lacks them loses nothing.
_TRAINING_FIELDS: Final = ("hidden_dropout", "attention_dropout", "init_method_std")


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family a config.json belongs to. Raises CheckpointError naming those there are."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise CheckpointError(f"{where}: model_type {model_type!r} is not supported; convert one of {known}.")


def model_config_from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture a config.json describes. Raises CheckpointError naming the key that is missing or unsupported.

    `where` names the file in messages. Keys that transformers does not read for the family are of no account.
    """
    family = family_of(config, where)
    _check_supported(family, config, where)
    fields = {key.field: _value(config, key, where) for key in family.keys}
    theta, scaling = _rope(config, where)
    try:
        return ModelConfig(**{**family.implied, **fields, "rope_theta": theta, "rope_scaling": scaling})
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def hf_config(
    model: ModelConfig,
    original: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    special_tokens: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A config.json that transformers loads as `model`.

    `original` is the file the model came from: it is returned as it was, but for keys that no longer agree with
    `model` and the dtype of the weights. Without it, `special_tokens` ("eos_token_id") are added. Raises
    CheckpointError if no family in Hugging Face's format computes what `model` does.
    """
    family = _expressing_family(model) if original is None else family_of(original)
    _check_expressible(family, model)
    if original is None:
        header = {"architectures": [family.architecture], "model_type": family.model_type}
        result = {**header, **_spelled(family, model), "use_cache": True, **(special_tokens or {})}
    else:
        result = _updated(family, original, model)
    if dtype is not None:
        result["dtype" if "dtype" in result else "torch_dtype"] = str(dtype).removeprefix("torch.")
    return result


def architecture_differences(a: ModelConfig, b: ModelConfig, *, ignored: Sequence[str] = ()) -> dict[str, tuple]:
    """Field -> its two values, for every field in which `a` and `b` differ."""
    pairs = {field.name: (getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(ModelConfig)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in ignored}


def _check_supported(family: Family, config: Mapping[str, Any], where: str) -> None:
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(f"{where}: the weights are quantized ({method}); use the model in bf16, fp16 or fp32.")
    architectures = config.get("architectures")
    if architectures and family.architecture not in architectures:
        raise CheckpointError(
            f"{where}: architectures {architectures} is not supported; use a {family.architecture}, with its head."
        )
    for key, values in family.only.items():
        if config.get(key, values[0]) not in values:
            raise CheckpointError(
                f"{where}: {key} {config[key]!r} is not supported for {family.model_type}; use {' or '.join(values)}."
            )


def _value(config: Mapping[str, Any], key: ConfigKey, where: str) -> int | float | bool | None:
    value = config.get(key.key)
    if value is None:
        if key.required:
            raise CheckpointError(f"{where}: {key.key} is missing; restore the model's own config.json.")
        return key.default
    # JSON writes 0.0 as 0 where a program wanted so; true is an int to Python, but no size.
    is_of_kind = type(value) in ((int, float) if key.kind is float else (key.kind,))
    if not is_of_kind or (key.kind is int and value < 1):
        expected = {int: "a positive integer", float: "a number", bool: "true or false"}[key.kind]
        raise CheckpointError(f"{where}: {key.key} is {value!r}, not {expected}; restore the model's own config.json.")
    return key.kind(value)


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, with the precedence transformers 5 has: the dictionary counts before the top level."""
    spelling = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")} | (
        config.get(spelling) or {}
    )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope["partial_rotary_factor"] not in (None, 1):
        raise CheckpointError(
            f"{where}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported; "
            "use a model that rotates whole heads."
        )
    if rope_type not in _ROPE_NUMBERS or any(isinstance(value, Mapping) for value in rope.values()):
        kind = f"of type {rope_type!r}" if rope_type not in _ROPE_NUMBERS else "that differs between layers"
        raise CheckpointError(
            f"{where}: {spelling} {kind} is not supported; use a model with linear or llama3 scaling."
        )
    theta = float(rope["rope_theta"] or _DEFAULT_THETA)
    missing = [name for name in _ROPE_NUMBERS[rope_type] if not isinstance(rope.get(name), (int, float))]
    if missing:
        raise CheckpointError(f"{where}: {spelling} of type {rope_type!r} lacks {', '.join(missing)}; add them.")
    numbers = [float(rope[name]) for name in _ROPE_NUMBERS[rope_type]]
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", numbers[0])
    context = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    context = config.get("original_max_position_embeddings", context)
    factor, low, high = numbers
    return theta, RopeScaling("llama3", factor, low, high, original_max_position_embeddings=context)


def _spelled(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say what `model` is, in the spelling of transformers 4."""
    result: dict[str, Any] = {key.key: getattr(model, key.field) for key in family.keys}
    result |= {key: values[0] for key, values in family.only.items()}
    result["rope_theta"] = model.rope_theta
    result["rope_scaling"] = None
    if model.rope_scaling is not None:
        scaling = dataclasses.asdict(model.rope_scaling)
        numbers = {name: scaling[name] for name in _ROPE_NUMBERS[scaling["type"]]}
        if scaling["type"] == "llama3":
            numbers["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        result["rope_scaling"] = {"rope_type": scaling["type"], **numbers}
    return result


def _updated(family: Family, original: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """`original`, changed only where it says something else than `model`."""
    before, now = _spelled(family, model_config_from_hf(original)), _spelled(family, model)
    changed = {key: value for key, value in now.items() if value != before[key]}
    result = dict(original)
    if changed.keys() & set(_ROPE_KEYS):
        # Theta and scaling may stand in one dictionary, and which of two spellings counts depends on the reader.
        result = {key: value for key, value in result.items() if key not in _ROPE_KEYS}
        changed |= {key: now[key] for key in ("rope_theta", "rope_scaling")}
    return {**result, **changed}


def _expressing_family(model: ModelConfig) -> Family:
    """The family in whose format the fewest things about `model` cannot be said."""
    return min(FAMILIES, key=lambda family: len(_inexpressible(family, model)))


def _inexpressible(family: Family, model: ModelConfig) -> dict[str, tuple]:
    header = {"model_type": family.model_type}
    returned = model_config_from_hf({**header, **_spelled(family, model)})
    return architecture_differences(model, returned, ignored=_TRAINING_FIELDS)


def _check_expressible(family: Family, model: ModelConfig) -> None:
    differences = _inexpressible(family, model)
    if differences:
        listed = "; ".join(f"{name} is {ours!r}, there {theirs!r}" for name, (ours, theirs) in differences.items())
        raise CheckpointError(
            f"no Hugging Face model of a supported family computes what this one does ({family.model_type} comes "
            f"nearest: {listed}); keep the checkpoint in the native format."
        )
