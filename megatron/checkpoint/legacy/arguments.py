"""The recorded command line of a tree -> the model it describes, and the conventions it was written by.

Converters record a few arguments, trainers all of them; what is absent has the default of the program's flag. What
can be seen in the tensors themselves (biases, an own head) is taken from there.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from megatron.checkpoint.legacy import bert
from megatron.checkpoint.legacy.conventions import Conventions, QkvOrder
from megatron.checkpoint.legacy.keys import HEAD, layer_key
from megatron.checkpoint.legacy.recording import recorded_model
from megatron.checkpoint.source import JSON
from megatron.checkpoint.unpickle import StandIn
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig, RopeScaling

# Enum members of both programs, by their number and by their name; strings in later versions and from converters.
_POSITIONS: Mapping[object, str] = {
    1: "rotary",
    2: "absolute",
    "rotary": "rotary",
    "rope": "rotary",
    "absolute": "absolute",
    "learned_absolute": "absolute",
}
# Arguments that change the function, and the values of them that this project's model computes.
_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "use_post_ln": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "squared_relu": (False, None),
    "rotary_percent": (1.0, 1, None),
    "num_experts": (None, 0, 1),
    "multi_latent_attention": (False, None),
    "multi_query_attention": (False, None),
    "normalization": ("LayerNorm", "RMSNorm", None),
    "add_position_embedding": (True, False, None),
    "no_rope_freq": (None, 0),
    "rope_type": ("rope", None),
    "mrope_section": (None, []),
    "window_attn_skip_freq": (None, 0),
    "softmax_type": ("vanilla", None),
    "softmax_scale": (None,),
    "qk_l2_norm": (False, None),
    "attention_output_gate": (False, None),
    "quick_geglu": (False, None),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0, None),
    "use_mup": (False, None),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
}
# Only Megatron-LM has these arguments, only Megatron-LLM those.
_LM_ARGUMENTS: Final = ("swiglu", "normalization", "untie_embeddings_and_output_weights", "rotary_percent")
_QKV_ORDERS: Mapping[float, QkvOrder] = {0: "stacked", 1.0: "striped", 2.0: "grouped", 3.0: "grouped"}


@dataclass(frozen=True)
class Recorded:
    """The arguments of a tree. `where` is the file they come from, for messages."""

    args: Namespace
    version: float
    where: Path

    @property
    def tp(self) -> int | None:
        return self._size("tensor_model_parallel_size") or self._size("model_parallel_size")

    @property
    def pp(self) -> int | None:
        return self._size("pipeline_model_parallel_size")

    @property
    def is_megatron_lm(self) -> bool:
        """NVIDIA's program; Megatron-LLM otherwise, which also is what converters write for."""
        return any(hasattr(self.args, name) for name in _LM_ARGUMENTS) or self._value("position_embedding_type") in (
            "rope",
            "learned_absolute",
        )

    def model_config(self, keys: Collection[str], vocab_size: int, *, num_token_types: int = 0) -> ModelConfig:
        """The model, `keys` being those of its tensors. Raises CheckpointError naming what is absent or unsupported."""
        if recorded := recorded_model(self.args, self.where):
            return dataclasses.replace(recorded, vocab_size=vocab_size)
        is_bert = bert.is_bert(keys)
        if is_bert:
            bert.check_bert(self.args, keys, self.where)
        self._check_supported({**_SUPPORTED, **bert.SUPPORTED} if is_bert else _SUPPORTED)
        try:
            model = ModelConfig(
                **self._sizes(vocab_size),
                **self._block(keys),
                **self._positions(),
                **(bert.bert_fields(num_token_types) if is_bert else {}),
                hidden_dropout=float(self._value("hidden_dropout", 0.0)),
                attention_dropout=float(self._value("attention_dropout", 0.0)),
                init_method_std=float(self._value("init_method_std", 0.02)),
            )
        except ConfigError as error:
            raise CheckpointError(f"{self.where}: {error}") from error
        if model.position_embedding_type == "rotary" and model.kv_channels % 2:
            raise CheckpointError(
                f"{self.where}: its heads are {model.kv_channels} wide, and rotation pairs dimensions; "
                "hidden_size, num_attention_heads or kv_channels in its args are wrong."
            )
        return model

    def conventions(self, model: ModelConfig, *, rotary_pairs: bool | None = None) -> Conventions:
        """`rotary_pairs` overrides what the arguments say. Raises CheckpointError for an unknown version."""
        if self.version not in _QKV_ORDERS:
            known = ", ".join(map(str, _QKV_ORDERS))
            raise CheckpointError(
                f"{self.where}: checkpoint_version {self.version} is unknown; the versions are {known}."
            )
        is_lm = self.is_megatron_lm
        recorded = bool(self._value("rotary_interleaved", False)) if is_lm else True
        # With fewer key heads than query heads, the order was the same from the first version on.
        has_old_order = model.num_attention_heads == model.num_attention_heads_kv
        return Conventions(
            rotary_pairs=recorded if rotary_pairs is None else rotary_pairs,
            gate_first=is_lm,
            qkv=_QKV_ORDERS[self.version] if has_old_order else "grouped",
        )

    def _sizes(self, vocab_size: int) -> dict[str, Any]:
        heads = self._required("num_attention_heads")
        if self._value("group_query_attention", False):
            heads_kv = self._required("num_query_groups")
        else:
            heads_kv = self._value("num_attention_heads_kv", heads)
        longest = self._value("max_position_embeddings") or self._required("seq_length")
        return {
            "num_layers": self._required("num_layers"),
            "hidden_size": self._required("hidden_size"),
            "num_attention_heads": heads,
            "num_attention_heads_kv": heads_kv,
            "ffn_hidden_size": self._value("ffn_hidden_size"),
            "kv_channels": self._value("kv_channels"),
            "vocab_size": vocab_size,
            "max_position_embeddings": longest,
        }

    def _block(self, keys: Collection[str]) -> dict[str, Any]:
        glu = "swiglu" if self._value("swiglu", False) else self._value("glu_activation")
        has_mlp_bias = layer_key(0, "mlp.dense_h_to_4h.bias") in keys
        # The fused kernel computes the approximation, and only runs where there is a bias to fuse.
        approximates = bool(self._value("openai_gelu", False)) or (
            bool(self._value("bias_gelu_fusion", False)) and has_mlp_bias
        )
        return {
            "use_rms_norm": self._value("normalization") == "RMSNorm" or bool(self._value("use_rms_norm", False)),
            "layernorm_epsilon": float(self._value("layernorm_epsilon") or self._value("norm_epsilon", 1e-5)),
            "apply_layernorm_1p": bool(
                self._value("apply_layernorm_1p") or self._value("layernorm_zero_centered_gamma", False)
            ),
            "glu_activation": glu,
            "mlp_activation": "gelu_tanh" if approximates and glu is None else "gelu",
            "parallel_attn": bool(self._value("parallel_attn", False)),
            "parallel_layernorm": bool(self._value("parallel_layernorm", False)),
            "qk_layernorm": bool(self._value("qk_layernorm", False)),
            "sliding_window_size": self._window(),
            "qkv_bias": layer_key(0, "self_attention.query_key_value.bias") in keys,
            "attention_output_bias": layer_key(0, "self_attention.dense.bias") in keys,
            "mlp_bias": has_mlp_bias,
            "tie_embed_logits": self._is_tied(keys),
        }

    def _positions(self) -> dict[str, Any]:
        recorded = self._value("position_embedding_type", "absolute")
        if isinstance(recorded, StandIn):
            recorded = recorded.args[0] if recorded.args else None
        if recorded not in _POSITIONS:
            raise CheckpointError(
                f"{self.where}: position_embedding_type {recorded!r} is not supported; rotary and absolute are."
            )
        # The first versions with rotary positions had a flag of its own for them.
        is_rotary = _POSITIONS[recorded] == "rotary" or bool(self._value("use_rotary_position_embeddings", False))
        return {
            "position_embedding_type": "rotary" if is_rotary else "absolute",
            "rope_theta": float(self._value("rope_theta") or self._value("rotary_base", 10000.0)),
            "rope_scaling": self._rope_scaling(),
        }

    def _rope_scaling(self) -> RopeScaling | None:
        """Both programs have rope_scaling_factor: Megatron-LM for Llama 3's scaling, if a flag of its own asks for it.

        Its linear scaling has another name.
        """
        interpolation = float(self._value("rotary_seq_len_interpolation_factor", 1.0))
        if not self.is_megatron_lm:
            factor = float(self._value("rope_scaling_factor", interpolation))
            return RopeScaling("linear", factor) if factor != 1.0 else None
        if not self._value("use_rope_scaling", False):
            return RopeScaling("linear", interpolation) if interpolation != 1.0 else None
        if interpolation != 1.0:
            raise CheckpointError(
                f"{self.where}: the model was trained with rotary_seq_len_interpolation_factor {interpolation} and "
                "use_rope_scaling, which together are not supported."
            )
        # The other constants are no arguments of the program, but those of Llama 3.1 in its code.
        return RopeScaling("llama3", float(self._value("rope_scaling_factor", 8.0)), 1.0, 4.0, 8192)

    def _window(self) -> int | None:
        """Megatron-LM counts the positions to the left, -1 for all; Megatron-LLM the token's own as well."""
        window = self._value("window_size")
        if not isinstance(window, tuple | list):
            return self._value("sliding_window_size")
        return None if window[0] == -1 else window[0] + 1

    def _is_tied(self, keys: Collection[str]) -> bool:
        if hasattr(self.args, "untie_embeddings_and_output_weights"):
            return not self.args.untie_embeddings_and_output_weights
        return bool(self._value("tie_embed_logits", HEAD not in keys))

    def _check_supported(self, supported: Mapping[str, tuple[object, ...]]) -> None:
        for name, values in supported.items():
            value = self._value(name)
            if value not in values:
                raise CheckpointError(
                    f"{self.where}: the model was trained with {name} {value!r}, which is not supported."
                )

    def _value(self, name: str, default: Any = None) -> Any:
        value = getattr(self.args, name, None)
        return default if value is None else value

    def _required(self, name: str) -> int:
        if (size := self._size(name)) is None:
            raise CheckpointError(
                f"{self.where}: its args lack {name}; use a tree that records what its model is, or add it there."
            )
        return size

    def _size(self, name: str) -> int | None:
        value = self._value(name)
        if value is not None and (type(value) is not int or value < 1):
            raise CheckpointError(f"{self.where}: its args have {name} {value!r}, which is not a positive integer.")
        return value


def recorded_precision(args: Namespace) -> dict[str, JSON]:
    """In which half precision a run trained, as this project's runs record it; nothing where the arguments do not say.

    The weights of a run in half precision are read from its fp32 masters, so that their own dtype does not tell.
    """
    if not any(hasattr(args, name) for name in ("bf16", "fp16", "params_dtype")):
        return {}
    computed_in = getattr(args, "params_dtype", None)
    return {
        "bf16": bool(getattr(args, "bf16", False)) or computed_in == torch.bfloat16,
        "fp16": bool(getattr(args, "fp16", False)) or computed_in == torch.float16,
    }
