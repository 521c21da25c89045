"""A Hugging Face folder -> the native format, some rows of a tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.commit import commit
from megatron.checkpoint.hf import HuggingFaceSource, carried_files
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.source import CheckpointInfo, RunState, row_chunks
from megatron.checkpoint.storage import OutgoingPiece, write_file
from megatron.checkpoint.tokenizer_files import TOKENIZER_FOLDER, identity_of, tokenizer_files
from megatron.core.topology import Axis
from megatron.errors import CheckpointError

WEIGHTS_FILE = "weights.safetensors"


def import_hf_folder(
    source: HuggingFaceSource,
    root: Path,
    *,
    model_name: str,
    dtype: torch.dtype | None = None,
    on_bytes: Callable[[int], object],
) -> Path:
    """Writes `source` as iteration 0 under `root`, with its tokenizer in ``root/tokenizer``; returns the iteration.

    Every tensor keeps its dtype unless one is asked for. Memory does not depend on the model: some rows are
    read at a time, and `on_bytes` hears of them when they are written. Raises
    CheckpointError if `root` holds anything, or cannot be written.
    """
    if root.exists() and not (root.is_dir() and all(entry.name.startswith(".") for entry in root.iterdir())):
        raise CheckpointError(f"{root} exists and is not an empty folder; choose another or remove it.")
    carried = carried_files(source)
    if dtype is not None:
        config = carried["hf_config"]
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    tokenizer_folder = root / TOKENIZER_FOLDER
    try:
        if source.tokenizer() is not None:
            _copy(tokenizer_files(source.path), tokenizer_folder)
        state = RunState(iteration=0, config={**carried})
        info = CheckpointInfo(state, source.model_config(), model_name, identity_of(tokenizer_folder))
        pieces = [_piece(source, name, dtype, on_bytes) for name in source.names()]
        return commit(
            root,
            info,
            lambda folder: [write_file(folder / WEIGHTS_FILE, pieces)],
            Axis("world"),
            expected=source.names(),
        )
    except BaseException:
        shutil.rmtree(tokenizer_folder, ignore_errors=True)
        raise


def _piece(
    source: HuggingFaceSource, name: str, dtype: torch.dtype | None, on_bytes: Callable[[int], object]
) -> OutgoingPiece:
    shape = source.shape(name)
    written = dtype or source.dtype(name)
    return OutgoingPiece(name, shape, written, Rectangle.whole(shape), partial(_read, source, name, written, on_bytes))


def _read(
    source: HuggingFaceSource, name: str, dtype: torch.dtype, on_bytes: Callable[[int], object]
) -> Iterator[Tensor]:
    shape = source.shape(name)
    for rows in row_chunks(source, name, (0,) * len(shape), shape):
        converted = rows.to(dtype)
        yield converted
        on_bytes(converted.nbytes)


def _copy(files: dict[str, Path], folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
        for name, file in files.items():
            shutil.copyfile(file, folder / name)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}); choose a folder that is writable."
        ) from error
