"""Sliding windows in config.json: one window for all layers, or keys that choose among the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from megatron.checkpoint.hf_family import Family
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig

WINDOW_KEYS: Final = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

# What transformers takes where a key is absent, for every family that reads it.
_DEFAULT_WINDOW: Final = 4096
_DEFAULT_FULL_LAYERS: Final = 28


def read_window(family: Family, config: Mapping[str, Any], num_layers: int, where: str) -> int | None:
    """The number of positions a token attends to; None for all. Raises CheckpointError if layers differ in it."""
    if family.window == "none":
        return None
    window = config.get("sliding_window", _DEFAULT_WINDOW)
    if window is not None and (type(window) is not int or window < 1):
        raise CheckpointError(
            f"{where}: sliding_window is {window!r}, not a positive integer or null; "
            "restore the model's own config.json."
        )
    if family.window == "key":
        return window
    if not config.get("use_sliding_window", False):
        window = None
    kinds = sorted(set(_kinds_of_layers(config, window, num_layers)))
    if kinds == ["full_attention"]:
        return None
    if kinds == ["sliding_attention"] and window is not None:
        return window
    raise CheckpointError(
        f"{where}: layers of {' and '.join(kinds)} with a window of {window} (layer_types, max_window_layers, "
        "sliding_window) are not supported; use a model whose layers all attend alike."
    )


def spelled_window(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that say the same, in the spelling of transformers 4."""
    window = model.sliding_window_size
    if family.window == "none":
        return {}
    if family.window == "key":
        return {"sliding_window": window}
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": model.num_layers if window is None else 0,
    }


def _kinds_of_layers(config: Mapping[str, Any], window: int | None, num_layers: int) -> Sequence[str]:
    if (kinds := config.get("layer_types")) is not None:
        return kinds
    num_full = num_layers if window is None else min(num_layers, config.get("max_window_layers", _DEFAULT_FULL_LAYERS))
    return ["full_attention"] * num_full + ["sliding_attention"] * (num_layers - num_full)
