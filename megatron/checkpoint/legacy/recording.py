"""A model -> the arguments that Megatron-LLM would have recorded for it, and what it could not have been told."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from megatron.checkpoint.hf import carried_files
from megatron.checkpoint.legacy.bert import bert_arguments
from megatron.checkpoint.legacy.tokenizers import tokenizer_arguments, wordpiece_arguments
from megatron.checkpoint.source import Source
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig, RopeScaling

# Megatron-LLM passes over arguments that it does not know. Under this name they hold every field of the model, for
# what the others cannot say.
MODEL_ARGUMENT: Final = "model_config"
# And the files of the Hugging Face model it was made from, so that an export can give them back.
CARRIED_ARGUMENT: Final = "carried_files"

_TOKENIZERS: Mapping[str, str] = {"falcon": "FalconTokenizer", "gpt": "GPT2BPETokenizer", "gpt2": "GPT2BPETokenizer"}


def arguments_of(
    source: Source,
    layout: ParallelLayout,
    *,
    model_name: str | None,
    num_chunks: int,
    padded_vocab_size: int,
    vocabulary_multiple: int,
    dtype: torch.dtype,
) -> Namespace:
    """All that its --use_checkpoint_args takes, and what its programs compare when they load."""
    model, state = source.model_config(), source.state()
    per_stage = model.num_layers // (layout.pp * num_chunks)
    return Namespace(
        **{**_model_arguments(model), **(bert_arguments(model) if model.bert_head else {})},
        **{MODEL_ARGUMENT: dataclasses.asdict(model), CARRIED_ARGUMENT: carried_files(source)},
        model_name=model_name,
        padded_vocab_size=padded_vocab_size,
        vocab_size=model.vocab_size,
        make_vocab_size_divisible_by=vocabulary_multiple,
        **{
            "tokenizer_type": _TOKENIZERS.get(model_name or "", "SentencePieceTokenizer"),
            **(wordpiece_arguments(source) if model.bert_head else tokenizer_arguments(source)),
        },
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        num_layers_per_virtual_pipeline_stage=per_stage if num_chunks > 1 else None,
        params_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        consumed_train_samples=0 if state is None else state.consumed_samples,
        consumed_valid_samples=0,
        seed=1234 if state is None or state.seed is None else state.seed,
    )


def beyond_megatron_llm(model: ModelConfig) -> list[str]:
    """What Megatron-LLM does not compute, so that it refuses the tree or computes something else from it.

    Of a BERT, which Megatron-LLM has no program for, what Megatron-LM does not compute.
    """
    biases = (model.qkv_bias, model.attention_output_bias, model.mlp_bias)
    own_head_width = model.kv_channels * model.num_attention_heads != model.hidden_size
    beyond = {
        "qk_layernorm": model.qk_layernorm,
        "apply_layernorm_1p": model.apply_layernorm_1p,
        "scale_embeddings": model.scale_embeddings,
        "biases on some of the linears": any(biases) and not all(biases),
        "geglu_tanh": model.glu_activation == "geglu_tanh",
        "gelu_tanh without a bias": model.mlp_activation == "gelu_tanh" and not model.mlp_bias,
        "rope scaling other than linear": model.rope_scaling is not None and model.rope_scaling.type != "linear",
        "rotary heads of a width of their own": own_head_width and model.position_embedding_type == "rotary",
        f"{model.num_token_types} token types": model.bert_head and model.num_token_types != 2,
        "a BERT with an untied head": model.bert_head and not model.tie_embed_logits,
        f"a BERT with {model.glu_activation}": model.bert_head and model.glu_activation not in (None, "swiglu"),
    }
    return [name for name, is_beyond in beyond.items() if is_beyond]


def recorded_model(args: Namespace, where: Path) -> ModelConfig | None:
    """The model that this project recorded; None if another program did."""
    fields = getattr(args, MODEL_ARGUMENT, None)
    if not isinstance(fields, Mapping):
        return None
    try:
        scaling = fields.get("rope_scaling")
        return ModelConfig(**{**fields, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"{where}: its args have a {MODEL_ARGUMENT} that this program does not understand ({error}); "
            "use the program that wrote it."
        ) from error


def _model_arguments(model: ModelConfig) -> dict[str, Any]:
    is_linear = model.rope_scaling is not None and model.rope_scaling.type == "linear"
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_attention_heads_kv": model.num_attention_heads_kv,
        "kv_channels": model.kv_channels,
        "max_position_embeddings": model.max_position_embeddings,
        "seq_length": model.max_position_embeddings,
        "position_embedding_type": model.position_embedding_type,
        "rope_theta": model.rope_theta,
        "rope_scaling_factor": model.rope_scaling.factor if is_linear and model.rope_scaling is not None else 1.0,
        "sliding_window_size": model.sliding_window_size,
        "use_rms_norm": model.use_rms_norm,
        "layernorm_epsilon": model.layernorm_epsilon,
        "use_post_ln": False,
        "use_bias": model.mlp_bias,
        "glu_activation": model.glu_activation,
        "bias_gelu_fusion": model.mlp_activation == "gelu_tanh",
        "bias_dropout_fusion": False,
        "parallel_attn": model.parallel_attn,
        "parallel_layernorm": model.parallel_layernorm,
        "tie_embed_logits": model.tie_embed_logits,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "lima_dropout": False,
        "init_method_std": model.init_method_std,
    }
