"""The published models, as data: a family's architecture, and the sizes it was published in.

A further family is one more `_FAMILIES` entry with its sizes, and one more table in `megatron/checkpoint/hf_rules.py`
if its weights are to be converted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from megatron.errors import ConfigError
from megatron.model.config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class _Family:
    """`architecture` holds what every size has in common; `sizes` what each one sets beyond or against it.

    `hub` names a size's repository on the Hugging Face hub.
    """

    architecture: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)


_LLAMA_ARCHITECTURE: Mapping[str, Any] = {
    "use_rms_norm": True,
    "glu_activation": "swiglu",
    "position_embedding_type": "rotary",
    "qkv_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "tie_embed_logits": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


def _size(layers: int, hidden: int, heads: int, heads_kv: int, ffn: int, **other: Any) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_attention_heads_kv": heads_kv,
        "ffn_hidden_size": ffn,
        **other,
    }


def _stretched(factor: float) -> dict[str, Any]:
    """Llama 3.1 and later: 128k tokens from a model first trained on 8k."""
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, original_max_position_embeddings=8192)
    return {"max_position_embeddings": 131072, "rope_scaling": scaling}


_LLAMA_7B: Mapping[str, Any] = _size(32, 4096, 32, 32, 11008)
_LLAMA_13B: Mapping[str, Any] = _size(40, 5120, 40, 40, 13824)
_LLAMA3_8B: Mapping[str, Any] = _size(32, 4096, 32, 8, 14336)
_LLAMA3_70B: Mapping[str, Any] = _size(80, 8192, 64, 8, 28672)
_LLAMA3_405B: Mapping[str, Any] = _size(126, 16384, 128, 8, 53248, **_stretched(8.0))

_FAMILIES: Final[Mapping[str, _Family]] = MappingProxyType(
    {
        "gpt": _Family({}),
        "llama": _Family(
            {**_LLAMA_ARCHITECTURE, "layernorm_epsilon": 1e-6, "vocab_size": 32000, "max_position_embeddings": 2048},
            {
                "7": _LLAMA_7B,
                "13": _LLAMA_13B,
                "30": _size(60, 6656, 52, 52, 17920),
                "65": _size(80, 8192, 64, 64, 22016),
            },
            {size: f"huggyllama/llama-{size}b" for size in ("7", "13", "30", "65")},
        ),
        "llama2": _Family(
            {**_LLAMA_ARCHITECTURE, "layernorm_epsilon": 1e-5, "vocab_size": 32000, "max_position_embeddings": 4096},
            {"7": _LLAMA_7B, "13": _LLAMA_13B, "70": _size(80, 8192, 64, 8, 28672)},
            {size: f"meta-llama/Llama-2-{size}b-hf" for size in ("7", "13", "70")},
        ),
        "codellama": _Family(
            {
                **_LLAMA_ARCHITECTURE,
                "layernorm_epsilon": 1e-5,
                "rope_theta": 1e6,
                "vocab_size": 32016,
                "max_position_embeddings": 16384,
            },
            {
                "7": _LLAMA_7B,
                "13": _LLAMA_13B,
                # The 16 tokens for infilling were added to the smaller models only.
                "34": _size(48, 8192, 64, 8, 22016, vocab_size=32000),
            },
            {size: f"codellama/CodeLlama-{size}b-hf" for size in ("7", "13", "34")},
        ),
        "llama3": _Family(
            {
                **_LLAMA_ARCHITECTURE,
                "layernorm_epsilon": 1e-5,
                "rope_theta": 5e5,
                "vocab_size": 128256,
                "max_position_embeddings": 8192,
            },
            {
                "8": _LLAMA3_8B,
                "70": _LLAMA3_70B,
                "405": _LLAMA3_405B,  # published as 3.1 only
                "3.1-8": {**_LLAMA3_8B, **_stretched(8.0)},
                "3.1-70": {**_LLAMA3_70B, **_stretched(8.0)},
                "3.1-405": _LLAMA3_405B,
                "3.2-1": _size(16, 2048, 32, 8, 8192, tie_embed_logits=True, **_stretched(32.0)),
                "3.2-3": _size(28, 3072, 24, 8, 8192, tie_embed_logits=True, **_stretched(32.0)),
            },
            {
                "8": "meta-llama/Meta-Llama-3-8B",
                "70": "meta-llama/Meta-Llama-3-70B",
                "405": "meta-llama/Llama-3.1-405B",
                "3.1-8": "meta-llama/Llama-3.1-8B",
                "3.1-70": "meta-llama/Llama-3.1-70B",
                "3.1-405": "meta-llama/Llama-3.1-405B",
                "3.2-1": "meta-llama/Llama-3.2-1B",
                "3.2-3": "meta-llama/Llama-3.2-3B",
            },
        ),
    }
)

MODEL_NAMES: Final[tuple[str, ...]] = tuple(_FAMILIES)

# What a size does not fix: a vocabulary comes from a tokenizer, a context length from the data.
_FREE_FIELDS: Final = ("vocab_size", "max_position_embeddings")

PRESETS: Final[Mapping[tuple[str, str], ModelConfig]] = MappingProxyType(
    {
        (model_name, size): ModelConfig(**{**family.architecture, **sizes})
        for model_name, family in _FAMILIES.items()
        for size, sizes in family.sizes.items()
    }
)


def preset(model_name: str, size: str) -> ModelConfig:
    """The published model, "llama2" "70" for example. Raises ConfigError naming the sizes there are."""
    _family(model_name)
    if (model_name, size) not in PRESETS:
        sizes = model_sizes(model_name)
        remedy = f"use one of {', '.join(sizes)}" if sizes else "give --num_layers, --hidden_size and so on"
        raise ConfigError(f"--size {size}: {model_name} was not published in this size; {remedy}.")
    return PRESETS[model_name, size]


def model_sizes(model_name: str) -> tuple[str, ...]:
    """The sizes of `model_name` in billions of parameters, as `preset` takes them; none for "gpt"."""
    return tuple(_family(model_name).sizes)


def hub_name(model_name: str, size: str) -> str:
    """The repository on the Hugging Face hub that holds the weights of a published size."""
    preset(model_name, size)
    return _family(model_name).hub[size]


def family_defaults(model_name: str) -> dict[str, Any]:
    """The `ModelConfig` fields that `--model_name` decides when the sizes are given one by one; none for "gpt".

    The vocabulary and the context length are left to the tokenizer and the data.
    """
    return {name: value for name, value in _family(model_name).architecture.items() if name not in _FREE_FIELDS}


def _family(model_name: str) -> _Family:
    if model_name not in _FAMILIES:
        raise ConfigError(f"--model_name {model_name} is unknown; {_nearest(model_name, MODEL_NAMES)}")
    return _FAMILIES[model_name]


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}."
