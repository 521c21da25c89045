"""The parser of a training run: every owner's flags, and the spellings that set fields in another way."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Final

from megatron.cli.flags import Owner, add_flags
from megatron.cli.parser import ArgumentParser
from megatron.config.original_flags import ACCEPTED, REFUSED, Accepted
from megatron.config.parallel import ParallelConfig
from megatron.config.training import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron.data.config import DataConfig
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig, RopeScaling
from megatron.optimizer.config import OptimizerConfig
from megatron.tokenizer.config import TokenizerConfig

MODEL: Final = Owner(
    "model", "model (what is not given comes from --model_name, --size or the checkpoint)", ModelConfig
)
OWNERS: Final = (
    MODEL,
    Owner("parallel", "parallelism, pipeline schedule and recomputation", ParallelConfig),
    Owner("training", "training", TrainingConfig),
    Owner("optimizer", "optimizer and learning rate", OptimizerConfig),
    Owner("data", "data", DataConfig),
    Owner("tokenizer", "tokenizer", TokenizerConfig),
    Owner("checkpoint", "checkpoints", CheckpointConfig),
    Owner("logging", "logging", LoggingConfig),
)

# The number of embedding rows follows from the tokenizer or the checkpoint; --vocab_size is the NullTokenizer's.
_DERIVED_MODEL_FIELDS: Final = frozenset({"vocab_size"})


def make_parser(**kwargs: Any) -> ArgumentParser:
    """A parser of all flags of a run. Its namespace has ``section.field`` for what was typed, and nothing else."""
    parser = ArgumentParser(refused=REFUSED, argument_default=argparse.SUPPRESS, usage="%(prog)s [flags]", **kwargs)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same flags; the command line wins")
    for owner in OWNERS:
        group = add_flags(parser, owner, without=_DERIVED_MODEL_FIELDS if owner is MODEL else frozenset())
        if owner is MODEL:
            _add_model_spellings(group)
    _add_alias(parser, "--encoder_num_layers", "model.num_layers")
    _add_alias(parser, "--encoder_seq_length", "data.seq_length")
    parser.add_argument(
        "--recompute_activations",
        action=SetFields,
        fields={"parallel.recompute_granularity": "selective"},
        help="the same as --recompute_granularity selective",
    )
    for name, accepted in ACCEPTED.items():
        nargs = None if accepted.takes_value else 0
        parser.add_argument(f"--{name}", action=NoteAccepted, accepted=accepted, nargs=nargs, help=argparse.SUPPRESS)
    return parser


class SetFields(argparse.Action):
    """A flag without a value that sets several fields."""

    def __init__(self, *, fields: Mapping[str, object], **kwargs: Any):
        super().__init__(nargs=0, **kwargs)
        self.fields = fields

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for dest, value in self.fields.items():
            setattr(namespace, dest, value)


class NoteAccepted(argparse.Action):
    """A flag that has no effect here: noted in ``namespace.accepted``, or refused where its value would matter."""

    def __init__(self, *, accepted: Accepted, **kwargs: Any):
        super().__init__(**kwargs)
        self.accepted = accepted

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        flag = self.option_strings[0]
        if self.accepted.harmless and values not in self.accepted.harmless:
            raise ConfigError(f"{flag} {values} is not available: {self.accepted.otherwise}.")
        noted = f"{flag} ({self.accepted.instead})"
        namespace.accepted = [*getattr(namespace, "accepted", []), noted]


class _LinearRopeScaling(argparse.Action):
    """``--rope_scaling_factor F``: positions divided by F."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not values >= 1:
            raise ConfigError(f"--rope_scaling_factor {values} would shorten the context; use 1 or more.")
        setattr(namespace, self.dest, None if values == 1 else RopeScaling("linear", factor=values))


def _add_model_spellings(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--use_bias",
        action=SetFields,
        fields={"model.qkv_bias": True, "model.attention_output_bias": True, "model.mlp_bias": True},
        help="biases in all linear layers of attention and MLP",
    )
    group.add_argument(
        "--rope_scaling_factor",
        dest="model.rope_scaling",
        action=_LinearRopeScaling,
        type=float,
        metavar="X",
        help="divide rotary positions by this, for contexts that are longer by this factor (linear scaling)",
    )


def _add_alias(parser: ArgumentParser, flag: str, dest: str) -> None:
    parser.add_argument(flag, dest=dest, type=int, metavar="N", help=f"the same as --{dest.partition('.')[2]}")
