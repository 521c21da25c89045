"""The `.metadata` of a torch.distributed.checkpoint tree: which bytes of which file hold which rectangle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from megatron.checkpoint.inert_pickle import read_inert
from megatron.checkpoint.plan import Rectangle, tiling_defect
from megatron.checkpoint.unpickle import StandIn
from megatron.errors import CheckpointError, DamagedCheckpointError

METADATA_FILE: Final = ".metadata"

_REMEDY: Final = "Copy the checkpoint again from where it was saved, or use another."


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, stored as a stream of torch.save in `num_bytes` bytes of `file` from `offset` on."""

    rectangle: Rectangle
    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class ChunkedTensor:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(folder: Path) -> dict[str, ChunkedTensor]:
    """The tensors of a tree by name; entries that are no tensors are left out.

    Raises CheckpointError if the file brings what could run a program, is damaged, or if chunks leave a gap, overlap,
    or reach beyond their files.
    """
    path = folder / METADATA_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); give a complete checkpoint.") from error
    record = read_inert(content, path)
    try:
        tensors = _tensors(record, path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(
            f"{path} is no metadata of torch.distributed.checkpoint ({type(error).__name__}: {error}). {_REMEDY}"
        ) from error
    for name, tensor in tensors.items():
        if defect := tiling_defect(tensor.shape, [chunk.rectangle for chunk in tensor.chunks]):
            raise DamagedCheckpointError(f"{path}: {name} is not whole: {defect}. {_REMEDY}")
    _check_files(folder, tensors)
    return tensors


def _tensors(record: StandIn, path: Path) -> dict[str, ChunkedTensor]:
    places = {_place(index): info.state for index, info in record.state["storage_data"].items()}
    return {
        name: _tensor(name, stored.state, places, path)
        for name, stored in record.state["state_dict_metadata"].items()
        if stored.qualified_name.endswith(".TensorStorageMetadata")
    }


def _place(index: StandIn) -> tuple[str, tuple[int, ...] | None]:
    return index.state["fqn"], index.state.get("offset")


def _tensor(name: str, stored: Mapping[str, Any], places: Mapping[Any, Mapping[str, Any]], path: Path) -> ChunkedTensor:
    properties = stored["properties"].state
    dtype = properties["dtype"] if isinstance(properties, Mapping) else properties[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} has {dtype!r} for its dtype")
    chunks = []
    for chunk in stored["chunks"]:
        rectangle = Rectangle(_sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"]))
        if rectangle.num_elements:  # a rank may hold no row of a tensor that has fewer rows than ranks
            info = places[name, rectangle.start]
            chunks.append(_chunk(name, rectangle, info, path))
    return ChunkedTensor(dtype, _sizes(stored["size"]), tuple(chunks))


def _chunk(name: str, rectangle: Rectangle, info: Mapping[str, Any], path: Path) -> Chunk:
    file, (offset, num_bytes) = info["relative_path"], _sizes((info["offset"], info["length"]))
    if Path(file).name != file:
        raise CheckpointError(f"{path}: {name} lies in {file}, outside of the checkpoint's folder. {_REMEDY}")
    if info.get("transform_descriptors"):
        raise CheckpointError(
            f"{path}: {name} was stored through {', '.join(info['transform_descriptors'])}, which is not supported; "
            "save the checkpoint without extensions."
        )
    return Chunk(rectangle, file, offset, num_bytes)


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r} are no sizes")
    return tuple(values)


def _check_files(folder: Path, tensors: Mapping[str, ChunkedTensor]) -> None:
    ends: dict[str, int] = {}
    for chunk in (chunk for tensor in tensors.values() for chunk in tensor.chunks):
        ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.offset + chunk.num_bytes)
    for file, end in sorted(ends.items()):
        if not (folder / file).is_file():
            raise DamagedCheckpointError(f"{folder / file} is missing, but {METADATA_FILE} lists it. {_REMEDY}")
        if (num_bytes := (folder / file).stat().st_size) < end:
            raise DamagedCheckpointError(
                f"{folder / file} has {num_bytes} bytes and {METADATA_FILE} says at least {end}: it was cut off. "
                f"{_REMEDY}"
            )
