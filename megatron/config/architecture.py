"""The architecture of a run: family < published size < checkpoint < what is typed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from megatron.config.checkpoint_arguments import CheckpointArguments
from megatron.config.typed import TypedFlags
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.model.presets import family_defaults, preset

# Changing these keeps the meaning of trained weights (the last two only with rotary positions).
_FREE_WITH_CHECKPOINT: Final = frozenset(
    {"hidden_dropout", "attention_dropout", "init_method_std", "rope_theta", "rope_scaling", "max_position_embeddings"}
)
# What all models of a family have in common, and together tells families apart. One that a family does not set is at
# the default of the field.
_MARKS_OF_A_FAMILY: Final = (
    "use_rms_norm",
    "glu_activation",
    "mlp_activation",
    "position_embedding_type",
    "parallel_attn",
    "qk_layernorm",
    "apply_layernorm_1p",
    "scale_embeddings",
    "use_post_ln",
    "bidirectional",
    "bert_head",
)
_POSITIVE: Final = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_attention_heads_kv",
    "ffn_hidden_size",
    "kv_channels",
    "max_position_embeddings",
    "vocab_size",
)


def resolve_model(
    typed: TypedFlags, checkpoint: CheckpointArguments | None, tokenizer_vocab_size: int | None
) -> ModelConfig:
    """Raises ConfigError where sizes are missing, cannot be, or contradict the checkpoint they are taken from."""
    explicit = typed.section("model")
    _check_values(explicit)
    if checkpoint is not None:
        return _from_checkpoint(checkpoint.model, explicit, typed.section("training"))
    known = {**_from_family(typed), **_vocabulary(tokenizer_vocab_size), **explicit}
    seq_length = typed.section("data").get("seq_length")
    if "max_position_embeddings" not in known and seq_length is not None:
        known["max_position_embeddings"] = seq_length
    _check_complete(known)
    if tokenizer_vocab_size is not None and known["vocab_size"] < tokenizer_vocab_size:
        raise ConfigError(
            f"vocab_size {known['vocab_size']} of the model is smaller than the tokenizer's {tokenizer_vocab_size} "
            "ids; leave it out, and the model gets a row for each."
        )
    return ModelConfig(**known)


def _from_family(typed: TypedFlags) -> dict[str, Any]:
    model_name, size = str(typed.section("training").get("model_name", "gpt")), typed.section("training").get("size")
    if size is None:
        return family_defaults(model_name)
    published = preset(model_name, str(size))
    return {field.name: getattr(published, field.name) for field in dataclasses.fields(published)}


def _vocabulary(tokenizer_vocab_size: int | None) -> dict[str, Any]:
    return {} if tokenizer_vocab_size is None else {"vocab_size": tokenizer_vocab_size}


def _from_checkpoint(stored: ModelConfig, explicit: Mapping[str, Any], training: Mapping[str, Any]) -> ModelConfig:
    if "model_name" in training:
        _check_family(stored, str(training["model_name"]))
    fixed = set(explicit) - _FREE_WITH_CHECKPOINT
    if stored.position_embedding_type == "absolute":
        fixed |= set(explicit) & {"max_position_embeddings"}
    differing = [name for name in explicit if name in fixed and explicit[name] != getattr(stored, name)]
    if differing:
        listed = ", ".join(f"--{name} {explicit[name]} (checkpoint: {getattr(stored, name)})" for name in differing)
        raise ConfigError(
            f"{listed}: typed values differ from the checkpoint that --use_checkpoint_args takes them from; "
            "leave them out."
        )
    return dataclasses.replace(stored, **explicit)


def _check_family(stored: ModelConfig, model_name: str) -> None:
    family = family_defaults(model_name)
    if not family:
        return  # "gpt" is any architecture
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)} | family
    for name in _MARKS_OF_A_FAMILY:
        if defaults[name] != getattr(stored, name):
            raise ConfigError(
                f"--model_name {model_name} has {name} {defaults[name]}, and the checkpoint has "
                f"{getattr(stored, name)}: it is of another family; give the family it was made from."
            )


def _check_values(explicit: Mapping[str, Any]) -> None:
    for name in _POSITIVE:
        if explicit.get(name) is not None and explicit[name] < 1:
            raise ConfigError(f"--{name} {explicit[name]} is not a size; use 1 or more.")
    for name in ("hidden_dropout", "attention_dropout"):
        if name in explicit and not 0 <= explicit[name] < 1:
            raise ConfigError(f"--{name} {explicit[name]} is not a probability below 1; use 0 for no dropout.")
    for name in ("layernorm_epsilon", "rope_theta"):
        if name in explicit and not explicit[name] > 0:
            raise ConfigError(f"--{name} {explicit[name]} is not positive; leave it out for the family's own.")
    if explicit.get("init_method_std", 0) < 0:
        raise ConfigError(f"--init_method_std {explicit['init_method_std']} is negative; use 0.02, say.")


def _check_complete(known: Mapping[str, Any]) -> None:
    required = [field.name for field in dataclasses.fields(ModelConfig) if field.default is dataclasses.MISSING]
    missing = [f"--{name}" for name in required if name not in known and name != "vocab_size"]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, so the architecture is not known; "
            "give all sizes, or --model_name with a published --size, or --load PATH --use_checkpoint_args."
        )
    if "vocab_size" not in known:
        raise ConfigError(
            "the size of the vocabulary is not known; give a tokenizer with --tokenizer_model, or --tokenizer_type "
            "NullTokenizer --vocab_size N."
        )
