"""Rotary positions in config.json, in the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5
(`rope_parameters`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig, RopeScaling

ROPE_KEYS: Final = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")

_NUMBERS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
)
_DEFAULT_THETA: Final = 10000.0


def read_rope(config: Mapping[str, Any], max_position_embeddings: int, where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, with the precedence transformers 5 has: the dictionary counts before the top level, but for
    the original context.
    """
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
    if rope_type not in _NUMBERS or any(isinstance(value, Mapping) for value in rope.values()):
        kind = f"of type {rope_type!r}" if rope_type not in _NUMBERS else "that differs between layers"
        raise CheckpointError(
            f"{where}: {spelling} {kind} is not supported; use a model with linear or llama3 scaling."
        )
    theta = rope["rope_theta"] or _DEFAULT_THETA
    if not isinstance(theta, (int, float)):
        raise CheckpointError(f"{where}: rope_theta is {theta!r}, not a number; restore the model's own config.json.")
    theta = float(theta)
    missing = [name for name in _NUMBERS[rope_type] if not isinstance(rope.get(name), (int, float))]
    if missing:
        raise CheckpointError(f"{where}: {spelling} of type {rope_type!r} lacks {', '.join(missing)}; add them.")
    numbers = [float(rope[name]) for name in _NUMBERS[rope_type]]
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", numbers[0])
    context = rope.get("original_max_position_embeddings", max_position_embeddings)
    # A model of transformers moves the outer number into the dictionary when it is built, whatever stands there.
    context = config.get("original_max_position_embeddings", context)
    if type(context) is not int or context < 1:
        raise CheckpointError(
            f"{where}: original_max_position_embeddings is {context!r}, not a positive integer; "
            "restore the model's own config.json."
        )
    factor, low, high = numbers
    return theta, RopeScaling("llama3", factor, low, high, original_max_position_embeddings=context)


def spelled_rope(model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say the same, in the spelling of transformers 4."""
    if model.rope_scaling is None:
        return {"rope_theta": model.rope_theta, "rope_scaling": None}
    scaling = dataclasses.asdict(model.rope_scaling)
    numbers = {name: scaling[name] for name in _NUMBERS[scaling["type"]]}
    if scaling["type"] == "llama3":
        numbers["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return {"rope_theta": model.rope_theta, "rope_scaling": {"rope_type": scaling["type"], **numbers}}
