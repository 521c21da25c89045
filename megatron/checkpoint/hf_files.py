"""The weight files of a Hugging Face folder: safetensors or pickled ones, one file or several with an index.

Opening reads headers only; slices are read when they are asked for.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.container import DTYPE_NAMES, DTYPES
from megatron.checkpoint.torch_files import TorchFile
from megatron.errors import CheckpointError, listed

WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLED_FILE: Final = "pytorch_model.bin"
PICKLED_INDEX_FILE: Final = "pytorch_model.bin.index.json"

_PICKLED: Final = ".bin"
# The pages of a mapped file that were touched count as memory of this process until it is opened anew.
_MAX_MAPPED_BYTES = 64 * 2**20
_MAX_SPANNED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FileTensor:
    """A tensor and where it lies. `dtype` has the names of safetensors ("BF16")."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


class WeightFiles:
    """All tensors of a folder by name, and slices of them. Threads may share one.

    Raises CheckpointError naming the file, and the tensor, where the folder is incomplete or a file is damaged.
    """

    def __init__(self, path: Path):
        self.tensors: Mapping[str, FileTensor] = _open_weights(path)
        self._pickled: dict[Path, TorchFile] = {}
        self._num_mapped_bytes = 0

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """A rectangle of a tensor, new and contiguous."""
        tensor = self.tensors[name]
        row_bytes = math.prod(tensor.shape[1:]) * DTYPES[tensor.dtype].itemsize
        step = max(1, _MAX_SPANNED_BYTES // row_bytes)
        # Whole rows are as many as the caller wants to hold; parts of rows touch the pages of all between them.
        if tuple(size[1:]) == tensor.shape[1:] or size[0] <= step:
            return self._read_slice(tensor, start, size, row_bytes)
        part = torch.empty(tuple(size), dtype=DTYPES[tensor.dtype])
        for row in range(0, size[0], step):
            place, extent = (start[0] + row, *start[1:]), (min(step, size[0] - row), *size[1:])
            part[row : row + step] = self._read_slice(tensor, place, extent, row_bytes)
        return part

    def _read_slice(self, tensor: FileTensor, start: Sequence[int], size: Sequence[int], row_bytes: int) -> Tensor:
        if tensor.file.suffix == _PICKLED:
            return self._opened(tensor.file, size[0] * row_bytes if size else 0).read(tensor.name, start, size)
        slices = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        try:
            # Opened for one read: see _MAX_MAPPED_BYTES.
            with safe_open(tensor.file, framework="pt") as opened:
                # A copy of its own: the slice is a view of the file.
                return opened.get_slice(tensor.name)[slices].clone(memory_format=torch.contiguous_format)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} cannot be read ({error}); download the file again."
            ) from error

    def _opened(self, file: Path, num_spanned_bytes: int) -> TorchFile:
        """A pickled file of which so many bytes are about to be touched."""
        if self._num_mapped_bytes > _MAX_MAPPED_BYTES:
            # An older file is no archive and lies in memory as a whole: to open it anew would gain nothing.
            self._pickled = {path: kept for path, kept in self._pickled.items() if not zipfile.is_zipfile(path)}
            self._num_mapped_bytes = 0
        opened = self._pickled  # another thread may begin anew at any moment
        if file not in opened:
            opened[file] = TorchFile(file)
        self._num_mapped_bytes += num_spanned_bytes
        return opened[file]


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); give a Hugging Face model folder.") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; download it again.")
    return content


def _open_weights(path: Path) -> dict[str, FileTensor]:
    """Safetensors count before pickled files, and a single file before an index, as they do in transformers."""
    for single, index in ((WEIGHTS_FILE, INDEX_FILE), (PICKLED_FILE, PICKLED_INDEX_FILE)):
        if (path / single).exists():
            return _read_header(path / single)
        if (path / index).exists():
            return _open_shards(path, path / index)
    raise CheckpointError(
        f"{path} has none of {WEIGHTS_FILE}, {INDEX_FILE}, {PICKLED_FILE} and {PICKLED_INDEX_FILE}; "
        "give a folder with a model's weights."
    )


def _open_shards(path: Path, index_file: Path) -> dict[str, FileTensor]:
    file_of = read_json(index_file).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise CheckpointError(f"{index_file} has no weight_map from tensors to files; download it again.")
    files = sorted(set(file_of.values()))
    if outside := [file for file in files if Path(file).name != file]:
        raise CheckpointError(f"{index_file} names {listed(outside)}, outside of its folder; download it again.")
    if absent := [file for file in files if not (path / file).is_file()]:
        raise CheckpointError(
            f"{index_file} names {listed(absent)}, which {'is' if len(absent) == 1 else 'are'} missing in {path}; "
            "download the missing files."
        )
    stored: dict[str, FileTensor] = {}
    problems = []
    for file in files:
        held = _read_header(path / file)
        problems += [f"{name} is not in {file}" for name, f in file_of.items() if f == file and name not in held]
        problems += [f"{file} holds {name}, which the index does not say" for name in held if file_of.get(name) != file]
        stored |= held
    if problems:
        raise CheckpointError(f"{index_file} and the files disagree: {listed(problems)}. Download the folder again.")
    return stored


def _read_header(file: Path) -> dict[str, FileTensor]:
    """The tensors of a file. The size of a safetensors file is checked against its header."""
    if file.suffix == _PICKLED:
        pickled = TorchFile(file)
        return {
            name: FileTensor(file, name, DTYPE_NAMES.get(pickled.dtype(name), "unknown"), pickled.shape(name))
            for name in pickled.names()
        }
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return {n: FileTensor(file, n, part.get_dtype(), tuple(part.get_shape())) for n, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is no complete safetensors file ({error}); it was cut off or damaged: download it again."
        ) from error
