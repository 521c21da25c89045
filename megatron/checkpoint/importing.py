"""Weights of another format -> the native one: iteration 0 of a new folder, tokenizer beside it.

Streamed, as every other conversion: see reshard.py. Loading needs no import, since any rank reads its slices from any
format; an import is for checksums, for one file to read, and for leaving the original behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.hf import carried_files
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.source import RunState, Source, TokenizerIdentity
from megatron.checkpoint.tokenizer_files import TOKENIZER_FOLDER, identity_of
from megatron.checkpoint.tokenizer_source import files_beside
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig


class ImportedWeights:
    """A `Source` of weights under the name they are imported as, with a tokenizer of its own.

    `dtype` is what the carried config.json is to say, None where the weights keep theirs.
    """

    def __init__(
        self, source: Source, *, model_name: str, tokenizer: TokenizerIdentity | None, dtype: torch.dtype | None
    ):
        self._source, self._model_name, self._tokenizer = source, model_name, tokenizer
        carried: dict[str, Any] = carried_files(source)
        if dtype is not None and (config := carried.get("hf_config")) is not None:
            config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        self._carried = carried

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return self._source.read(name, start, size)

    def model_config(self) -> ModelConfig:
        return self._source.model_config()

    def model_name(self) -> str:
        return self._model_name

    def tokenizer(self) -> TokenizerIdentity | None:
        return self._tokenizer

    def state(self) -> RunState:
        return RunState(iteration=0, config=self._carried)


def import_weights(
    source: Source,
    root: Path,
    *,
    model_name: str,
    dtype: torch.dtype | None = None,
    on_bytes: Callable[[int], object],
) -> Path:
    """Writes `source` as iteration 0 under `root`, with its tokenizer in ``root/tokenizer``; returns the iteration.

    Every tensor keeps its dtype unless one is asked for. `on_bytes` hears of bytes when they are written. Raises
    CheckpointError if `root` holds anything, or cannot be written; nothing of a failed import stays.
    """
    if root.exists() and not (root.is_dir() and all(entry.name.startswith(".") for entry in root.iterdir())):
        raise CheckpointError(f"{root} exists and is not an empty folder; choose another or remove it.")
    folder = root / TOKENIZER_FOLDER
    try:
        _copy(files_beside(source), folder)
        imported = ImportedWeights(source, model_name=model_name, tokenizer=identity_of(folder), dtype=dtype)
        plan = plan_resharding(imported, ParallelLayout(), weights_dtype=dtype)
        return reshard(plan, root, on_bytes=on_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    try:
        if files:
            folder.mkdir(parents=True)
        for name, file in files.items():
            shutil.copyfile(file, folder / name)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}); choose a folder that is writable."
        ) from error
