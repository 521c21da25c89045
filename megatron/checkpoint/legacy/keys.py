"""The spellings of a stored tensor's name, brought to one: that of the Megatron-LM of 2023, and Megatron-LLM's.

Nested dictionaries and dotted keys mean the same. Converters write ``transformer`` and ``attention`` where trainers
write ``encoder`` and ``self_attention``; later versions renamed norms, and linears by what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor

HEAD: Final = "lm_head"
EMBEDDING: Final = "embedding.word_embeddings.weight"
HEAD_COPY: Final = "word_embeddings_for_head.weight"
# Of a BERT, whose head has tensors of its own before the projection to the vocabulary.
TOKEN_TYPES: Final = "embedding.tokentype_embeddings.weight"
HEAD_MODULE: Final = "lm_head."

# (pattern, its place in the one spelling), applied one after the other.
_SPELLINGS: Final = (
    (r"^(module\.)+", ""),
    (r"^language_model\.", ""),
    (r"^word_embeddings\.", "embedding.word_embeddings."),
    (r"^(position|tokentype)_embeddings\.", r"embedding.\1_embeddings."),
    (r"^(transformer|decoder)\.", "encoder."),
    (r"^(output_layer|lm_head)\.weight$", HEAD),
    (r"\.attention\.", ".self_attention."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.self_attention\.linear_qkv\.", ".self_attention.query_key_value."),
    (r"\.self_attention\.linear_proj\.", ".self_attention.dense."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".post_attention_layernorm."),
    (r"\.mlp\.linear_fc1\.", ".mlp.dense_h_to_4h."),
    (r"\.mlp\.linear_fc2\.", ".mlp.dense_4h_to_h."),
    (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
    (r"\.(input|post_attention|mlp|final)_norm\.", r".\1_layernorm."),
    (r"^lm_head\.norm\.", "lm_head.layernorm."),
)
# Tables that follow from the configuration, and states of libraries' kernels.
_IGNORED: Final = re.compile(r"(^|\.)(inv_freq|_extra_state)$")
_LAYER: Final = re.compile(r"^encoder\.layers\.(\d+)\.")


def flat_tensors(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """One spelling of every tensor's name -> the tensor, of one model chunk's state."""
    return {_spelled(key): value for key, value in _leaves(model, "") if not _IGNORED.search(key)}


def num_layers(keys: Mapping[str, object]) -> int:
    """The number of layers among `keys`, whose numbers start at 0 in every chunk."""
    numbers = {int(match[1]) for match in map(_LAYER.match, keys) if match}
    return max(numbers, default=-1) + 1


def layer_key(layer: int, tensor: str) -> str:
    return f"encoder.layers.{layer}.{tensor}"


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a trainer of Megatron-LLM stores for a chunk whose tensors have these names."""
    language_model: dict[str, Any] = {}
    result: dict[str, Any] = {"language_model": language_model}
    for key, tensor in tensors.items():
        if key == HEAD:
            language_model[HEAD] = tensor
        elif key == HEAD_COPY:
            result["word_embeddings_for_head"] = {"weight": tensor}
        elif key.startswith("encoder."):
            language_model.setdefault("encoder", {})[key.removeprefix("encoder.")] = tensor
        elif key.startswith("embedding."):
            embedding, table, leaf = key.split(".")
            language_model.setdefault(embedding, {}).setdefault(table, {})[leaf] = tensor
        else:
            module, leaf = key.split(".", 1)
            (language_model if module == "pooler" else result).setdefault(module, {})[leaf] = tensor
    return result


def _leaves(value: object, key: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def _spelled(key: str) -> str:
    for pattern, replacement in _SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key
