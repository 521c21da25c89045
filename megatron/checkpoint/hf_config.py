"""Hugging Face's config.json <-> `ModelConfig`.

Read are the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`); whatever would
change the function and is not supported is an error. Written is the spelling of transformers 4 for a model born here,
since both versions read it, and the original with the least changes for a model that came from such a file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from megatron.checkpoint.hf_family import ConfigKey, Family
from megatron.checkpoint.hf_rope import ROPE_KEYS, read_rope, spelled_rope
from megatron.checkpoint.hf_rules import FAMILIES
from megatron.checkpoint.hf_window import WINDOW_KEYS, read_window, spelled_window
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig

# Training settings, which are not part of what a weight means: a format that lacks them loses nothing.
_TRAINING_FIELDS: Final = ("hidden_dropout", "attention_dropout", "init_method_std")


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The table a config.json belongs to: of those for its model_type, the one whose settings it has most of.

    Raises CheckpointError naming the types there are.
    """
    tables = _tables_of(config.get("model_type"))
    if not tables:
        known = ", ".join(_model_types())
        raise CheckpointError(
            f"{where}: model_type {config.get('model_type')!r} is not supported; convert one of {known}."
        )
    return min(tables, key=lambda family: len(_wrong_settings(family, config)))


def model_config_from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The architecture a config.json describes. Raises CheckpointError naming the key that is missing or unsupported.

    `where` names the file in messages. Keys that transformers does not read for the family are of no account.
    """
    family = family_of(config, where)
    _check_supported(family, config, where)
    fields: dict[str, Any] = {key.field: _value(config, key, where) for key in family.keys}
    fields |= {choice.field: choice.values[config.get(choice.key, choice.default)] for choice in family.choices}
    fields["sliding_window_size"] = read_window(family, config, fields["num_layers"], where)
    if family.is_rotary:
        theta, scaling = read_rope(config, fields["max_position_embeddings"], where)
        fields |= {"rope_theta": theta, "rope_scaling": scaling}
    try:
        return ModelConfig(**{**family.implied, **fields})
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def hf_config(
    model: ModelConfig,
    original: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    special_tokens: Mapping[str, int] | None = None,
    model_name: str | None = None,
) -> dict[str, Any]:
    """A config.json that transformers loads as `model`.

    `original` is the file the model came from: it is returned as it was, but for keys that no longer agree with
    `model` and the dtype of the weights. Without it, `special_tokens` ("eos_token_id") are added, and of several
    families that compute what `model` does the one called `model_name` is taken. Raises CheckpointError if no family
    in Hugging Face's format computes it.
    """
    tables = FAMILIES if original is None else _tables_of(original["model_type"])
    family = _expressing_table(tables, model, model_name)
    if original is None:
        header = {"architectures": [family.architectures[0]], "model_type": family.model_type}
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


def _tables_of(model_type: object) -> list[Family]:
    return [family for family in FAMILIES if family.model_type == model_type]


def _model_types() -> list[str]:
    return list(dict.fromkeys(family.model_type for family in FAMILIES))


def _wrong_settings(family: Family, config: Mapping[str, Any]) -> list[str]:
    return [s.key for s in family.settings if config.get(s.key, s.default) not in s.values]


def _check_supported(family: Family, config: Mapping[str, Any], where: str) -> None:
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(f"{where}: the weights are quantized ({method}); use the model in bf16, fp16 or fp32.")
    architectures = config.get("architectures")
    if architectures and not set(family.architectures) & set(architectures):
        raise CheckpointError(
            f"{where}: architectures {architectures} is not supported; use a {family.architectures[0]}, with its head."
        )
    supported = {setting.key: setting.values for setting in family.settings}
    wrong = {key: supported[key] for key in _wrong_settings(family, config)}
    wrong |= {
        choice.key: tuple(choice.values)
        for choice in family.choices
        if config.get(choice.key, choice.default) not in choice.values
    }
    for key, values in wrong.items():
        listed = " or ".join(value if isinstance(value, str) else json.dumps(value) for value in values)
        raise CheckpointError(
            f"{where}: {key} {config.get(key)!r} is not supported for {family.model_type}; use {listed}."
        )


def _value(config: Mapping[str, Any], key: ConfigKey, where: str) -> int | float | bool | None:
    name = key.alias if key.alias is not None and key.key not in config else key.key
    value = config.get(name)
    if value is None:
        if key.required:
            raise CheckpointError(f"{where}: {key.key} is missing; restore the model's own config.json.")
        return None if key.null_is_derived and name in config else key.default
    # JSON writes 0.0 as 0 where a program wanted so; true is an int to Python, but no size.
    is_of_kind = type(value) in ((int, float) if key.kind is float else (key.kind,))
    if not is_of_kind or (key.kind is int and value < 1):
        expected = {int: "a positive integer", float: "a number", bool: "true or false"}[key.kind]
        raise CheckpointError(f"{where}: {name} is {value!r}, not {expected}; restore the model's own config.json.")
    return key.kind(value)


def _spelled(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say what `model` is, in the spelling of transformers 4."""
    result: dict[str, Any] = {key.key: getattr(model, key.field) for key in family.keys}
    for choice in family.choices:
        words = [word for word, value in choice.values.items() if value == getattr(model, choice.field)]
        result[choice.key] = words[0] if words else choice.default
    result |= {setting.key: setting.values[0] for setting in family.settings}
    result |= spelled_window(family, model)
    return {**result, **spelled_rope(model)} if family.is_rotary else result


def _updated(family: Family, original: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """`original`, changed only where it says something else than `model`."""
    now = _spelled(family, model)
    result = _with_keys(family, original, now, _otherwise(now, original))
    # A key that is absent follows from others, and has to be written where one of those changed: the context before
    # its scaling is that of the model, the number of key/value heads that of the query heads.
    return _with_keys(family, result, now, _otherwise(now, result))


def _otherwise(now: Mapping[str, Any], config: Mapping[str, Any]) -> set[str]:
    """The keys of `now` that `config` does not mean, whether it has them or not."""
    try:
        said = _spelled(family_of(config), model_config_from_hf(config))
    except CheckpointError:  # sizes of which one follows from another that changed: nothing goes without saying
        return set(now)
    return {key for key, value in now.items() if key not in said or value != said[key]}


def _with_keys(family: Family, config: Mapping[str, Any], now: Mapping[str, Any], changed: set[str]) -> dict[str, Any]:
    """`config` with the keys of `now` that `changed` names, and without other spellings of them."""
    superseded = {key.alias for key in family.keys if key.key in changed}
    for keys in (ROPE_KEYS, WINDOW_KEYS):
        if changed & set(keys):
            # They may stand in one dictionary, and which of two spellings counts depends on the reader.
            superseded |= set(keys)
            changed = changed | (now.keys() & set(keys))
    kept = {key: value for key, value in config.items() if key not in superseded}
    return {**kept, **{key: value for key, value in now.items() if key in changed}}


def _expressing_table(tables: Sequence[Family], model: ModelConfig, model_name: str | None) -> Family:
    """The table by which the fewest things about `model` cannot be said. Raises CheckpointError if there are any."""
    family = min(tables, key=lambda table: (len(_inexpressible(table, model)), table.model_type != model_name))
    if differences := _inexpressible(family, model):
        listed = "; ".join(f"{name} is {ours!r}, there {theirs!r}" for name, (ours, theirs) in differences.items())
        raise CheckpointError(
            f"no Hugging Face model of a supported family computes what this one does ({family.model_type} comes "
            f"nearest: {listed}); keep the checkpoint in the native format."
        )
    return family


def _inexpressible(family: Family, model: ModelConfig) -> dict[str, tuple]:
    """What is lost when `model` is written by `family` and read back."""
    spelled = _spelled(family, model)
    try:
        returned = model_config_from_hf({"model_type": family.model_type, **spelled})
    except CheckpointError:
        # Not even readable (a size that this family must derive, and cannot): all that is not spelled is lost.
        return {field.name: (getattr(model, field.name), None) for field in dataclasses.fields(ModelConfig)}
    return architecture_differences(model, returned, ignored=_TRAINING_FIELDS)
