"""How each family of models is spelled in Hugging Face's format: one table a family, read in both directions.

The tables hold no code: `hf_config` reads and writes config.json by them, `hf` and `hf_export` the weights. Names are
given for one layer, `{i}`; which of them a model has (biases, a head of its own) follows from its `ModelConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True)
class ConfigKey:
    """One key of config.json and the `ModelConfig` field it stands for.

    `default` is what transformers takes where the key is absent or null. Some defaults follow from other fields:
    None leaves such a field to `ModelConfig`. A key that is `required` has no default that could be right.
    """

    key: str
    field: str
    kind: type[int] | type[float] | type[bool]
    default: int | float | bool | None = None
    required: bool = False


@dataclass(frozen=True)
class Family:
    """`names` maps native names to Hugging Face's. `ignored` are buffers in old files that the config determines.

    `implied` are the `ModelConfig` fields that no key of config.json says. `only` are keys with the values that mean
    what this family computes, the preferred spelling first; the first is also taken where the key is absent.
    """

    model_type: str
    architecture: str
    names: Mapping[str, str]
    keys: tuple[ConfigKey, ...]
    implied: Mapping[str, Any]
    only: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...] = ()

    def hf_name(self, native_name: str) -> str:
        """``layers.3.mlp.up.weight`` -> ``model.layers.3.mlp.up_proj.weight``"""
        layer = _LAYER.match(native_name)
        if layer is None:
            return self.names[native_name]
        return self.names[_LAYER.sub("layers.{i}.", native_name)].format(i=layer[1])

    def is_ignored(self, hf_name: str) -> bool:
        return any(re.fullmatch(re.escape(name).replace(r"\{i\}", r"\d+"), hf_name) for name in self.ignored)


def _required(key: str, field: str) -> ConfigKey:
    return ConfigKey(key, field, int, required=True)


LLAMA: Final = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    names=MappingProxyType(
        {
            "embedding.word.weight": "model.embed_tokens.weight",
            "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
            "layers.{i}.attention.q.weight": "model.layers.{i}.self_attn.q_proj.weight",
            "layers.{i}.attention.q.bias": "model.layers.{i}.self_attn.q_proj.bias",
            "layers.{i}.attention.k.weight": "model.layers.{i}.self_attn.k_proj.weight",
            "layers.{i}.attention.k.bias": "model.layers.{i}.self_attn.k_proj.bias",
            "layers.{i}.attention.v.weight": "model.layers.{i}.self_attn.v_proj.weight",
            "layers.{i}.attention.v.bias": "model.layers.{i}.self_attn.v_proj.bias",
            "layers.{i}.attention.output.weight": "model.layers.{i}.self_attn.o_proj.weight",
            "layers.{i}.attention.output.bias": "model.layers.{i}.self_attn.o_proj.bias",
            "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
            "layers.{i}.mlp.gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
            "layers.{i}.mlp.gate.bias": "model.layers.{i}.mlp.gate_proj.bias",
            "layers.{i}.mlp.up.weight": "model.layers.{i}.mlp.up_proj.weight",
            "layers.{i}.mlp.up.bias": "model.layers.{i}.mlp.up_proj.bias",
            "layers.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
            "layers.{i}.mlp.down.bias": "model.layers.{i}.mlp.down_proj.bias",
            "final_norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight",
        }
    ),
    keys=(
        _required("vocab_size", "vocab_size"),
        _required("hidden_size", "hidden_size"),
        _required("intermediate_size", "ffn_hidden_size"),
        _required("num_hidden_layers", "num_layers"),
        _required("num_attention_heads", "num_attention_heads"),
        _required("max_position_embeddings", "max_position_embeddings"),
        ConfigKey("num_key_value_heads", "num_attention_heads_kv", int),
        ConfigKey("head_dim", "kv_channels", int),
        ConfigKey("rms_norm_eps", "layernorm_epsilon", float, 1e-6),
        ConfigKey("attention_bias", "qkv_bias", bool, False),
        ConfigKey("attention_bias", "attention_output_bias", bool, False),
        ConfigKey("mlp_bias", "mlp_bias", bool, False),
        ConfigKey("tie_word_embeddings", "tie_embed_logits", bool, False),
        ConfigKey("attention_dropout", "attention_dropout", float, 0.0),
        ConfigKey("initializer_range", "init_method_std", float, 0.02),
    ),
    implied=MappingProxyType(
        {
            "use_rms_norm": True,
            "glu_activation": "swiglu",
            "position_embedding_type": "rotary",
            "hidden_dropout": 0.0,
        }
    ),
    only=MappingProxyType({"hidden_act": ("silu", "swish")}),
    ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
)

FAMILIES: Final[tuple[Family, ...]] = (LLAMA,)
