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


# Without `use_rms_norm` and `glu_activation`: LayerNorm, and an MLP of two matrices.
_FALCON_ARCHITECTURE: Mapping[str, Any] = {
    "use_rms_norm": False,
    "layernorm_epsilon": 1e-5,
    "glu_activation": None,
    "mlp_activation": "gelu",
    "position_embedding_type": "rotary",
    "parallel_attn": True,
    "qkv_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "tie_embed_logits": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "vocab_size": 65024,
    "max_position_embeddings": 2048,
}

_GPT2_ARCHITECTURE: Mapping[str, Any] = {
    "use_rms_norm": False,
    "layernorm_epsilon": 1e-5,
    "glu_activation": None,
    "mlp_activation": "gelu_tanh",
    "position_embedding_type": "absolute",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "tie_embed_logits": True,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "vocab_size": 50257,
    "max_position_embeddings": 1024,
}

_BERT_ARCHITECTURE: Mapping[str, Any] = {
    **_GPT2_ARCHITECTURE,
    "layernorm_epsilon": 1e-12,
    "mlp_activation": "gelu",
    "use_post_ln": True,
    "bidirectional": True,
    "num_token_types": 2,
    "embedding_layernorm": True,
    "bert_head": True,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}

_QWEN_ARCHITECTURE: Mapping[str, Any] = {
    **_LLAMA_ARCHITECTURE,
    "layernorm_epsilon": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
}

_GEMMA_ARCHITECTURE: Mapping[str, Any] = {
    **_LLAMA_ARCHITECTURE,
    "glu_activation": "geglu_tanh",
    "apply_layernorm_1p": True,
    "scale_embeddings": True,
    "layernorm_epsilon": 1e-6,
    "tie_embed_logits": True,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
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


_TIED: Mapping[str, Any] = {"tie_embed_logits": True}
# The larger Qwen2 models have more embedding rows, for the same tokens.
_QWEN2_LARGE: Mapping[str, Any] = {"vocab_size": 152064}
_QWEN2_LARGEST: Mapping[str, Any] = {**_QWEN2_LARGE, "layernorm_epsilon": 1e-5}

_LLAMA_7B: Mapping[str, Any] = _size(32, 4096, 32, 32, 11008)
_LLAMA_13B: Mapping[str, Any] = _size(40, 5120, 40, 40, 13824)
_LLAMA3_8B: Mapping[str, Any] = _size(32, 4096, 32, 8, 14336)
_LLAMA3_70B: Mapping[str, Any] = _size(80, 8192, 64, 8, 28672)
_LLAMA3_405B: Mapping[str, Any] = _size(126, 16384, 128, 8, 53248, **_stretched(8.0))

_MISTRAL_7B: Mapping[str, Any] = _LLAMA3_8B
_BERT_BASE: Mapping[str, Any] = _size(12, 768, 12, 12, 3072)
_BERT_LARGE: Mapping[str, Any] = _size(24, 1024, 16, 16, 4096)
_QWEN2_05B: Mapping[str, Any] = _size(24, 896, 14, 2, 4864, **_TIED)
_QWEN2_15B: Mapping[str, Any] = _size(28, 1536, 12, 2, 8960, **_TIED)
_QWEN2_7B: Mapping[str, Any] = _size(28, 3584, 28, 4, 18944, **_QWEN2_LARGE)
_QWEN2_72B: Mapping[str, Any] = _size(80, 8192, 64, 8, 29568, **_QWEN2_LARGEST)

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
        "falcon": _Family(
            _FALCON_ARCHITECTURE,
            {
                "7": _size(32, 4544, 71, 1, 18176),
                "40": _size(60, 8192, 128, 8, 32768, parallel_layernorm=True),
            },
            {size: f"tiiuae/falcon-{size}b" for size in ("7", "40")},
        ),
        "mistral": _Family(
            {**_LLAMA_ARCHITECTURE, "layernorm_epsilon": 1e-5, "vocab_size": 32000, "max_position_embeddings": 32768},
            {
                "7": {**_MISTRAL_7B, "sliding_window_size": 4096},
                "7-v0.2": {**_MISTRAL_7B, "rope_theta": 1e6},
                "7-v0.3": {**_MISTRAL_7B, "rope_theta": 1e6, "vocab_size": 32768},
            },
            {
                "7": "mistralai/Mistral-7B-v0.1",
                "7-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",  # its base model has no repository of its authors
                "7-v0.3": "mistralai/Mistral-7B-v0.3",
            },
        ),
        "gpt2": _Family(
            _GPT2_ARCHITECTURE,
            {
                "0.124": _size(12, 768, 12, 12, 3072),
                "0.355": _size(24, 1024, 16, 16, 4096),
                "0.774": _size(36, 1280, 20, 20, 5120),
                "1.5": _size(48, 1600, 25, 25, 6400),
            },
            {
                "0.124": "openai-community/gpt2",
                "0.355": "openai-community/gpt2-medium",
                "0.774": "openai-community/gpt2-large",
                "1.5": "openai-community/gpt2-xl",
            },
        ),
        "qwen2": _Family(
            {**_QWEN_ARCHITECTURE, "qkv_bias": True, "max_position_embeddings": 131072},
            {
                "0.5": _QWEN2_05B,
                "1.5": _QWEN2_15B,
                "7": _QWEN2_7B,
                "72": _QWEN2_72B,
                "2.5-0.5": {**_QWEN2_05B, "max_position_embeddings": 32768},
                "2.5-1.5": _QWEN2_15B,
                "2.5-3": _size(36, 2048, 16, 2, 11008, max_position_embeddings=32768, **_TIED),
                "2.5-7": _QWEN2_7B,
                "2.5-14": _size(48, 5120, 40, 8, 13824, **_QWEN2_LARGEST),
                "2.5-32": _size(64, 5120, 40, 8, 27648, **_QWEN2_LARGEST),
                "2.5-72": _QWEN2_72B,
            },
            {
                **{size: f"Qwen/Qwen2-{size}B" for size in ("0.5", "1.5", "7", "72")},
                **{f"2.5-{size}": f"Qwen/Qwen2.5-{size}B" for size in ("0.5", "1.5", "3", "7", "14", "32", "72")},
            },
        ),
        "qwen3": _Family(
            {**_QWEN_ARCHITECTURE, "qk_layernorm": True, "max_position_embeddings": 40960},
            {
                "0.6": _size(28, 1024, 16, 8, 3072, kv_channels=128, **_TIED),
                "1.7": _size(28, 2048, 16, 8, 6144, kv_channels=128, **_TIED),
                "4": _size(36, 2560, 32, 8, 9728, kv_channels=128, **_TIED),
                "8": _size(36, 4096, 32, 8, 12288, kv_channels=128),
                "14": _size(40, 5120, 40, 8, 17408, kv_channels=128),
                "32": _size(64, 5120, 64, 8, 25600, kv_channels=128),
            },
            {size: f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14", "32")},
        ),
        "gemma": _Family(
            _GEMMA_ARCHITECTURE,
            {"2": _size(18, 2048, 8, 1, 16384, kv_channels=256), "7": _size(28, 3072, 16, 16, 24576, kv_channels=256)},
            {size: f"google/gemma-{size}b" for size in ("2", "7")},
        ),
        "bert": _Family(
            _BERT_ARCHITECTURE,
            {
                "base": _BERT_BASE,
                "large": _BERT_LARGE,
                "base-cased": {**_BERT_BASE, "vocab_size": 28996},
                "large-cased": {**_BERT_LARGE, "vocab_size": 28996},
            },
            {
                "base": "google-bert/bert-base-uncased",
                "large": "google-bert/bert-large-uncased",
                "base-cased": "google-bert/bert-base-cased",
                "large-cased": "google-bert/bert-large-cased",
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
    """The sizes of `model_name` as `preset` takes them: billions of parameters, and a version; none for "gpt"."""
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
