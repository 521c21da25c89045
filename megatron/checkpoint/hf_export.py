"""Any source of weights -> a folder that transformers loads: safetensors files of bounded size, index, configs.

Tensors are copied a few rows at a time, so that memory depends neither on the model nor on its largest tensor. The
folder is written under a hidden name and put into its place when it is complete and on the disk.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.container import LENGTH_BYTES, build_header, bytes_of
from megatron.checkpoint.hf import CARRIED_FILES, CONFIG_FILE, carried_files
from megatron.checkpoint.hf_config import family_of, hf_config
from megatron.checkpoint.hf_files import INDEX_FILE, WEIGHTS_FILE
from megatron.checkpoint.hf_tensors import StoredTensor, stored_tensors
from megatron.checkpoint.locate import EXPORT_PREFIX
from megatron.checkpoint.placement import logical_shapes
from megatron.checkpoint.source import MODEL, Source
from megatron.durable import sync_file, sync_folder
from megatron.errors import CheckpointError, ConfigError

DEFAULT_SHARD_BYTES = 5 * 10**9

_ROWS_BYTES = 16 * 2**20


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor to be written: the logical tensors it is made of, and the dtype it is written in."""

    stored: StoredTensor
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Export:
    """All that a Hugging Face folder will hold but its tokenizer. `json_files` maps file names to content."""

    tensors: tuple[HuggingFaceTensor, ...]
    json_files: Mapping[str, Mapping[str, Any]]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def plan_export(
    source: Source, *, dtype: torch.dtype | None = None, special_tokens: Mapping[str, int] | None = None
) -> Export:
    """What an export of `source` consists of; nothing is read but names and shapes.

    Without `dtype`, the fp32 weights of a run in half precision become what it computed in (`dtype_of_run`), and every
    other tensor keeps its own. `special_tokens`
    ("eos_token_id") go into the config of a model that was born here. Raises CheckpointError if the format cannot
    express the model, or if the source lacks a tensor of it.
    """
    model, carried = source.model_config(), carried_files(source)
    original = carried.get("hf_config")
    logical = logical_shapes(model)
    held = set(source.names())
    if missing := [entry for name in logical if (entry := f"{MODEL}.{name}") not in held]:
        raise CheckpointError(f"{source.path} lacks {', '.join(missing[:4])}; export a complete checkpoint.")
    trained_in = dtype_of_run(source)
    wanted = dtype or half_precision(trained_in)
    dtypes = {name: wanted or source.dtype(f"{MODEL}.{name}") for name in logical}
    # An untouched conversion gives the original's dtype back, whatever it said.
    is_new = original is None or dtype is not None or trained_in is not None
    stated = next(iter(dtypes.values())) if is_new and len(set(dtypes.values())) == 1 else None
    config = hf_config(model, original, dtype=stated, special_tokens=special_tokens, model_name=source.model_name())
    tensors = tuple(
        # Parts of one stored tensor whose dtypes differ: the one that holds them all.
        HuggingFaceTensor(stored, reduce(torch.promote_types, (dtypes[part] for part in stored.parts)))
        for stored in stored_tensors(family_of(config), model, logical)
    )
    return Export(
        tensors, {**{file: carried[key] for key, file in CARRIED_FILES if key in carried}, CONFIG_FILE: config}
    )


def split_by_size(tensors: Sequence[HuggingFaceTensor], max_shard_bytes: int) -> list[list[HuggingFaceTensor]]:
    """Consecutive shards of at most `max_shard_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[HuggingFaceTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards


def split_by_number(tensors: Sequence[HuggingFaceTensor], num_shards: int) -> list[list[HuggingFaceTensor]]:
    """`num_shards` consecutive shards of about equal size, none of them empty."""
    if not 1 <= num_shards <= len(tensors):
        raise ConfigError(
            f"--num_output_shards {num_shards} cannot be had from {len(tensors)} tensors; use 1 to {len(tensors)}."
        )
    total = sum(tensor.num_bytes for tensor in tensors)
    shards: list[list[HuggingFaceTensor]] = [[]]
    done = 0
    for position, tensor in enumerate(tensors):
        is_full = done * num_shards >= total * len(shards)
        must_open = len(tensors) - position <= num_shards - len(shards)
        if shards[-1] and len(shards) < num_shards and (is_full or must_open):
            shards.append([])
        shards[-1].append(tensor)
        done += tensor.num_bytes
    return shards


def write_hf_folder(
    source: Source,
    export: Export,
    shards: Sequence[Sequence[HuggingFaceTensor]],
    folder: Path,
    *,
    other_files: Mapping[str, Path],
    on_bytes: Callable[[int], object],
) -> None:
    """Writes `folder`, which must not exist or be empty. `other_files` are copied under their new names.

    `on_bytes` hears of the bytes as they are written. All of them survive a power cut after this returns. Raises
    CheckpointError if anything fails; the folder is then as before, empty or not there.
    """
    check_output_folder(folder)
    place = folder.resolve()
    # A folder that exists may be the current one, or a disk of its own: it is filled, not replaced.
    beside = place if place.exists() else place.parent
    made = [parent for parent in place.parents if not parent.exists()]
    staging = beside / f"{EXPORT_PREFIX}{place.name}-{uuid.uuid4().hex}"
    try:
        staging.mkdir(parents=True)
        file_names = _write_shards(source, shards, staging, on_bytes)
        if len(shards) > 1:
            _write_json(staging / INDEX_FILE, _index(export, shards, file_names))
        for name, content in export.json_files.items():
            _write_json(staging / name, content)
        for name, file in other_files.items():
            shutil.copyfile(file, staging / name)
        _put(staging, place)
        for parent in made:
            sync_folder(parent.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}); choose a folder that is writable, on a disk with room "
            f"for {export.num_bytes:,} bytes."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output_folder(folder: Path) -> None:
    """Raises CheckpointError if `folder` exists and has anything in it."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder; choose another or remove it.")


def _put(staging: Path, place: Path) -> None:
    """Makes what `staging` holds durable, and then `place` of it."""
    files = sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_FILE)
    for file in files:
        sync_file(file)
    sync_folder(staging)
    if staging.parent != place:
        staging.rename(place)
        sync_folder(place.parent)
        return
    for file in files:  # config.json last: before it is there, nothing takes the folder for a model
        file.rename(place / file.name)
    staging.rmdir()
    sync_folder(place)


def dtype_of_run(source: Source) -> torch.dtype | None:
    """What the run that saved `source` computed in; None if no run did, but a conversion."""
    state = source.state()
    training = None if state is None else state.config.get("training")
    if not isinstance(training, Mapping) or "bf16" not in training:
        return None
    # Only runs of other programs know fp16.
    return torch.bfloat16 if training["bf16"] else torch.float16 if training.get("fp16") else torch.float32


def half_precision(dtype: torch.dtype | None) -> torch.dtype | None:
    """`dtype` if it is one of two bytes: what an export rounds the master weights of a run to."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _write_shards(
    source: Source, shards: Sequence[Sequence[HuggingFaceTensor]], folder: Path, on_bytes: Callable[[int], object]
) -> list[str]:
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    for name, tensors in zip(names, shards, strict=True):
        with open(folder / name, "xb") as file:
            file.write(_header(tensors))
            for tensor in tensors:
                for rows in _row_groups(source, tensor):
                    file.write(bytes_of(rows))
                    on_bytes(rows.nbytes)
            file.flush()
            os.fsync(file.fileno())
    return names


def _row_groups(source: Source, tensor: HuggingFaceTensor) -> Iterator[Tensor]:
    def read(part: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return source.read(f"{MODEL}.{part}", start, size).to(tensor.dtype)

    step = max(1, _ROWS_BYTES * tensor.shape[0] // tensor.num_bytes)
    for row in range(0, tensor.shape[0], step):
        yield tensor.stored.read_rows(row, min(step, tensor.shape[0] - row), read)


def _header(tensors: Sequence[HuggingFaceTensor]) -> bytes:
    """The header of a shard, with the mark that transformers looks for."""
    text = build_header({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})[0][LENGTH_BYTES:]
    marked = json.dumps({"__metadata__": {"format": "pt"}, **json.loads(text)}, separators=(",", ":")).encode()
    marked += b" " * (-len(marked) % LENGTH_BYTES)
    return len(marked).to_bytes(LENGTH_BYTES, "little") + marked


def _index(export: Export, shards: Sequence[Sequence[HuggingFaceTensor]], file_names: Sequence[str]) -> dict[str, Any]:
    weight_map = {tensor.name: name for name, shard in zip(file_names, shards, strict=True) for tensor in shard}
    return {"metadata": {"total_size": export.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
