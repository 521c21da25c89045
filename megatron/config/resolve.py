"""From what was typed to a whole configuration: pure, and before any process group exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

from megatron.config.architecture import resolve_model
from megatron.config.checkpoint_arguments import CheckpointArguments
from megatron.config.checks import check_run
from megatron.config.parallel import ParallelConfig
from megatron.config.run import RunConfig
from megatron.config.training import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron.config.typed import TypedFlags
from megatron.core.layout import ParallelLayout
from megatron.data.config import DataConfig
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.optimizer.config import OptimizerConfig
from megatron.tokenizer.config import TokenizerConfig

T = TypeVar("T")

# A tokenizer named by one of these is not the checkpoint's.
_NAMES_A_TOKENIZER = frozenset({"tokenizer_model", "vocab_file", "vocab_size"})


def resolve(
    typed: TypedFlags,
    world_size: int,
    *,
    checkpoint: CheckpointArguments | None = None,
    tokenizer_vocab_size: int | None = None,
) -> RunConfig:
    """Infers the data-parallel size and everything else left open for `world_size` processes, and checks it all.

    `checkpoint` is what ``--use_checkpoint_args`` takes over, `tokenizer_vocab_size` the number of ids of the
    tokenizer that `resolve_tokenizer` describes. Raises ConfigError.
    """
    parallel = build(ParallelConfig, typed.section("parallel"))
    layout = ParallelLayout.infer(
        world_size, tp=parallel.tensor_model_parallel_size, pp=parallel.pipeline_model_parallel_size
    )
    storage = build(CheckpointConfig, typed.section("checkpoint"))
    checkpoint = checkpoint if storage.use_checkpoint_args else None
    if storage.use_checkpoint_args and checkpoint is None:
        raise ConfigError(f"--use_checkpoint_args: nothing was read from --load {storage.load}; check the path.")
    training = _resolve_training(build(TrainingConfig, typed.section("training")), layout.dp)
    model = resolve_model(typed, checkpoint, tokenizer_vocab_size)
    run = RunConfig(
        model=model,
        parallel=parallel,
        training=training,
        optimizer=_resolve_optimizer(typed.section("optimizer"), training.train_iters),
        data=_resolve_data(build(DataConfig, typed.section("data")), model, checkpoint),
        tokenizer=resolve_tokenizer(typed, checkpoint),
        checkpoint=storage,
        logging=build(LoggingConfig, typed.section("logging")),
        world_size=world_size,
    )
    check_run(run)
    return run


def resolve_tokenizer(typed: TypedFlags, checkpoint: CheckpointArguments | None = None) -> TokenizerConfig:
    """The typed tokenizer, over the checkpoint's where none is named."""
    explicit = typed.section("tokenizer")
    stored = {} if checkpoint is None or _named(explicit) else checkpoint.tokenizer
    return build(TokenizerConfig, {**stored, **explicit})


def build(config_type: type[T], values: Mapping[str, Any]) -> T:
    """Raises ConfigError naming the flag where a field without a default is missing."""
    for field in dataclasses.fields(config_type):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            meaning = str(field.metadata["help"]).removesuffix("; required")
            raise ConfigError(f"--{field.name} is missing, and it has no default ({meaning}); give it.")
    return config_type(**values)


def _named(explicit: Mapping[str, object]) -> bool:
    return any(explicit.get(name) is not None for name in _NAMES_A_TOKENIZER)


def _resolve_training(training: TrainingConfig, dp: int) -> TrainingConfig:
    per_step = training.micro_batch_size * dp
    if training.global_batch_size is None:
        return dataclasses.replace(training, global_batch_size=per_step)
    if training.global_batch_size % per_step:
        raise ConfigError(
            f"--global_batch_size {training.global_batch_size} is not a multiple of {per_step} (--micro_batch_size "
            f"{training.micro_batch_size} x {dp} data-parallel ranks); use {_nearest_multiples(training, per_step)}."
        )
    return training


def _nearest_multiples(training: TrainingConfig, per_step: int) -> str:
    below = training.global_batch_size // per_step * per_step
    return f"{below} or {below + per_step}" if below else str(per_step)


def _resolve_optimizer(values: Mapping[str, Any], train_iters: int) -> OptimizerConfig:
    given = build(OptimizerConfig, values)
    decay_iters = train_iters if given.lr_decay_iters is None else given.lr_decay_iters
    warmup_iters = given.lr_warmup_iters
    if given.lr_warmup_fraction is not None:
        warmup_iters = int(given.lr_warmup_fraction * decay_iters)
    return dataclasses.replace(given, lr_decay_iters=decay_iters, lr_warmup_iters=warmup_iters, lr_warmup_fraction=None)


def _resolve_data(data: DataConfig, model: ModelConfig, checkpoint: CheckpointArguments | None) -> DataConfig:
    if data.seq_length is not None:
        return data
    stored = None if checkpoint is None else checkpoint.seq_length
    return dataclasses.replace(data, seq_length=model.max_position_embeddings if stored is None else stored)
