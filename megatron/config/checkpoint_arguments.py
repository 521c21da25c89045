"""What ``--use_checkpoint_args`` takes from a checkpoint: architecture, sequence length and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from megatron.checkpoint.source import Source
from megatron.checkpoint.tokenizer_files import TOKENIZER_FOLDER
from megatron.model.config import ModelConfig
from megatron.tokenizer.config import TokenizerConfig


@dataclass(frozen=True)
class CheckpointArguments:
    """Never layout, ZeRO stage, batch sizes or iterations: those belong to a run, not to a model.

    `seq_length` is None where the checkpoint is weights only. `tokenizer` holds fields of `TokenizerConfig`.
    """

    model: ModelConfig
    seq_length: int | None = None
    tokenizer: Mapping[str, object] = field(default_factory=dict)


def checkpoint_arguments(source: Source) -> CheckpointArguments:
    """Reads them from one of this project's checkpoints or from a Hugging Face folder."""
    state, identity = source.state(), source.tokenizer()
    recorded = {} if state is None else state.config
    tokenizer = _section(recorded, "tokenizer")
    known = {field.name for field in fields(TokenizerConfig)}
    tokenizer = {name: value for name, value in tokenizer.items() if name in known and value is not None}
    if not tokenizer and identity is not None:
        tokenizer = {"tokenizer_type": identity.tokenizer_type, "tokenizer_model": identity.tokenizer_model}
    tokenizer = _moved_along(tokenizer, source.path.parent / TOKENIZER_FOLDER)
    seq_length = _section(recorded, "data").get("seq_length")
    return CheckpointArguments(
        model=source.model_config(),
        seq_length=seq_length if isinstance(seq_length, int) else None,
        tokenizer={name: tuple(value) if isinstance(value, list) else value for name, value in tokenizer.items()},
    )


def _moved_along(tokenizer: Mapping[str, object], beside: Path) -> Mapping[str, object]:
    """Where the files are no longer where they were, the copy beside the checkpoint: a run's folder may be moved."""
    paths = (tokenizer.get("tokenizer_model") or tokenizer.get("vocab_file"), tokenizer.get("merge_file"))
    gone = [path for path in paths if isinstance(path, str) and not Path(path).exists()]
    if not gone or not beside.is_dir():
        return tokenizer
    return {**tokenizer, "tokenizer_model": str(beside), "vocab_file": None, "merge_file": None}


def _section(recorded: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = recorded.get(name)
    return section if isinstance(section, Mapping) else {}
