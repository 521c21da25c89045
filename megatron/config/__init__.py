"""The configuration of a run: the owners' dataclasses, their flags, and what is inferred and checked."""

from megatron.config.checkpoint_arguments import CheckpointArguments, checkpoint_arguments
from megatron.config.parallel import ParallelConfig
from megatron.config.resolve import resolve, resolve_tokenizer
from megatron.config.run import RunConfig
from megatron.config.training import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron.config.typed import TypedFlags, parse_run

__all__ = [
    "CheckpointArguments",
    "CheckpointConfig",
    "LoggingConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
    "TypedFlags",
    "checkpoint_arguments",
    "parse_run",
    "resolve",
    "resolve_tokenizer",
]
