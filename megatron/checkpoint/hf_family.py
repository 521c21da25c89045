"""What can be said about how a family of models is spelled in Hugging Face's format: the vocabulary of `hf_rules`.

A table of these holds no code and is read in both directions: `hf_config` reads and writes config.json by it, `hf` and
`hf_export` the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True)
class ConfigKey:
    """One key of config.json and the `ModelConfig` field it stands for.

    `default` is what transformers takes where the key is absent or null. Some defaults follow from other fields:
    None leaves such a field to `ModelConfig`, and so does a null where `null_is_derived`. A key that is `required` has
    no default that could be right. `alias` is another name of the key that is read
    where it is absent.
    """

    key: str
    field: str
    kind: type[int] | type[float] | type[bool]
    default: int | float | bool | None = None
    required: bool = False
    null_is_derived: bool = False
    alias: str | None = None


@dataclass(frozen=True)
class ConfigChoice:
    """A key of config.json whose words stand for values of a `ModelConfig` field.

    Of several words for one value the first is written. `default` is the word where the key is absent.
    """

    key: str
    field: str
    values: Mapping[str, str]
    default: str


@dataclass(frozen=True)
class Setting:
    """A key of config.json that says what a table takes for granted: one of `values`, of which the first is written.

    `default` is the value where the key is absent.
    """

    key: str
    values: tuple[str | int | bool | None, ...]
    default: str | int | bool | None


@dataclass(frozen=True)
class StoredModule:
    """A module there, and the modules here whose rows its weight and bias hold.

    `order` says where each row lies (see `fused_qkv`); "grouped" is of q, k and v. A `transposed` weight is stored
    [in, out]; a bias has no transpose. The word {i} is the layer's number.
    """

    name: str
    parts: tuple[str, ...]
    order: Literal["stacked", "grouped"] = "stacked"
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """A table. Several tables may share a `model_type`; their `settings` tell them apart.

    `architectures` are the classes whose weights are a whole model, the first is written. `implied` are the
    `ModelConfig` fields that no key of config.json says. `window` says which keys describe a sliding window: none,
    `sliding_window`, or also the keys that choose among the layers.

    Of the names of tensors, `prefix` may be missing in files (those of a model without its head), `ignored` are
    buffers in old files that the config determines, and `renamed` are older endings of names. `tied_copies` are what
    a model with a tied head may hold twice: the name there, and the logical tensor that it must equal.
    """

    model_type: str
    architectures: tuple[str, ...]
    modules: tuple[StoredModule, ...]
    keys: tuple[ConfigKey, ...]
    implied: Mapping[str, Any]
    settings: tuple[Setting, ...] = ()
    choices: tuple[ConfigChoice, ...] = ()
    window: Literal["none", "key", "layers"] = "none"
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    tied_copies: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_rotary(self) -> bool:
        return self.implied["position_embedding_type"] == "rotary"

    def is_ignored(self, hf_name: str) -> bool:
        """`hf_name` with or without the prefix."""
        patterns = (re.escape(name).replace(r"\{i\}", r"\d+") for name in self.ignored)
        return any(re.fullmatch(f"({re.escape(self.prefix)})?{pattern}", hf_name) for pattern in patterns)


def module_and_layer(native_name: str) -> tuple[str, str, str | None]:
    """``layers.3.mlp.up.weight`` -> ("layers.{i}.mlp.up", "weight", "3")"""
    module, _, kind = native_name.rpartition(".")
    layer = _LAYER.match(module)
    return _LAYER.sub("layers.{i}.", module), kind, None if layer is None else layer[1]
