"""The BERT of Megatron-LM: when it is the one of Devlin et al., and what its trees are called by.

Its layers have a norm before attention and one before the MLP, but under apply_residual_connection_post_layernorm they
add to what was normed: ``a = input_layernorm(x); b = post_attention_layernorm(a + attention(a)); y = b + mlp(b)``. Read
from one norm to the next, that is a layer with norms behind its sums. The first norm of all is then that of the
embedding, and each layer's second norm is stored as the next layer's first or, behind the last, as final_layernorm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from megatron.checkpoint.legacy.keys import HEAD_MODULE
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig

_RESIDUAL: Final = "apply_residual_connection_post_layernorm"
_TRANSFORM: Final = f"{HEAD_MODULE}dense.weight"
# What only the core models of Megatron-LM have.
_CORE: Final = frozenset({"output_layer.bias", f"{HEAD_MODULE}layer_norm.weight"})

# Arguments and their supported values, where they are others than a decoder's. The head computes GELU itself, unless
# openai_gelu approximates there too; and its norm is plain where all others are around one.
SUPPORTED: Mapping[str, tuple[object, ...]] = {
    _RESIDUAL: (True,),
    "openai_gelu": (False, None),
    "apply_layernorm_1p": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
}


def is_bert(keys: Collection[str]) -> bool:
    """`keys` are those of all tensors of a tree."""
    return _TRANSFORM in keys


def check_bert(args: object, keys: Collection[str], where: Path) -> None:
    """Raises CheckpointError for a BERT of Megatron-LM that is another model than the one here."""
    if _CORE & set(keys):
        raise CheckpointError(
            f"{where}: its BERT is of Megatron-LM's core models, whose norms come before attention and MLP whatever "
            f"{_RESIDUAL} says, and a BERT here has them behind. Use one that was trained with --use-legacy-models "
            "--apply-residual-connection-post-layernorm."
        )
    if not getattr(args, _RESIDUAL, False):
        raise CheckpointError(
            f"{where}: its BERT was trained without {_RESIDUAL}: its norms come before attention and MLP, whose "
            "outputs are added to what is not normed, and a BERT here, as in Hugging Face's format, has them behind. "
            "No order of the weights makes one of the other; use one that was trained with "
            "--apply-residual-connection-post-layernorm."
        )
    if "binary_head.weight" not in keys:
        raise CheckpointError(
            f"{where}: its BERT has no binary_head (--bert-no-binary-head), and so no pooler and no token types, "
            "which a BERT here has; use one that was trained with it."
        )


def bert_fields(num_token_types: int) -> dict[str, Any]:
    """The fields of the model that no argument says. `num_token_types` is 0 where the tree has no such tensor."""
    return {
        "bidirectional": True,
        "use_post_ln": True,
        "embedding_layernorm": True,
        "bert_head": True,
        # With a binary head there are two: without a tensor for them, it is missing.
        "num_token_types": num_token_types or 2,
    }


def bert_arguments(model: ModelConfig) -> dict[str, Any]:
    """What Megatron-LM records of a BERT, where that differs from what Megatron-LLM records of a decoder."""
    return {
        _RESIDUAL: True,
        "bert_binary_head": True,
        "openai_gelu": False,
        "position_embedding_type": "learned_absolute" if model.position_embedding_type == "absolute" else "rope",
        "add_position_embedding": model.position_embedding_type == "absolute",
        "add_bias_linear": model.mlp_bias,
        "swiglu": model.glu_activation == "swiglu",
        "normalization": "RMSNorm" if model.use_rms_norm else "LayerNorm",
        "apply_layernorm_1p": model.apply_layernorm_1p,
        "untie_embeddings_and_output_weights": not model.tie_embed_logits,
        "group_query_attention": model.num_attention_heads != model.num_attention_heads_kv,
        "num_query_groups": model.num_attention_heads_kv,
        "rotary_interleaved": True,
    }


def bert_flags(model: ModelConfig) -> str:
    """What Megatron-LM takes from its command line only, and would compute another function without."""
    fusion = " --no-bias-gelu-fusion" if model.mlp_activation == "gelu" else ""
    return (
        f"--apply-residual-connection-post-layernorm --layernorm-epsilon {model.layernorm_epsilon:g}{fusion}, "
        "and in later versions --use-legacy-models"
    )
