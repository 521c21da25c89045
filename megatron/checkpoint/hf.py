"""A Hugging Face folder, read as a source of weights.

The files are checked against config.json when the folder is opened: every tensor the model has is there, with its
shape, and nothing else is. Slices are read when they are asked for, also from tensors that hold several logical ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from megatron.checkpoint.container import DTYPES
from megatron.checkpoint.hf_config import family_of, model_config_from_hf
from megatron.checkpoint.hf_family import Family
from megatron.checkpoint.hf_files import FileTensor, WeightFiles, read_json
from megatron.checkpoint.hf_rules import LLAMA
from megatron.checkpoint.hf_tensors import StoredTensor, stored_tensors
from megatron.checkpoint.placement import logical_shapes
from megatron.checkpoint.source import MODEL, RunState, Source, TokenizerIdentity
from megatron.checkpoint.tokenizer_files import first_identity
from megatron.errors import CheckpointError, listed
from megatron.model.config import ModelConfig

CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"

# Under these keys of `RunState.config` a checkpoint carries the files of the model it was made from.
CARRIED_FILES: Final = (("hf_config", CONFIG_FILE), ("hf_generation_config", GENERATION_FILE))

_COMPARED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class _Entry:
    """A logical tensor: the stored tensor it lies in, the name in the files, and its own shape and dtype."""

    stored: StoredTensor
    file_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class HuggingFaceSource:
    """See `Source`. Raises CheckpointError naming file and tensor where config.json and the files disagree."""

    def __init__(self, path: Path):
        self.path = path
        config_file = path / CONFIG_FILE
        self.config = read_json(config_file)
        self._model = model_config_from_hf(self.config, str(config_file))
        self._files = WeightFiles(path)
        family = family_of(self.config)
        logical = logical_shapes(self._model)
        expected = {stored.name: stored for stored in stored_tensors(family, self._model, logical)}
        file_names = _file_names(family, expected, self._files.tensors)
        self._check(family, expected, file_names)
        self._entries = {
            f"{MODEL}.{part}": _Entry(stored, name, logical[part], DTYPES[self._files.tensors[name].dtype])
            for stored, name in ((expected[name], file_names[name]) for name in expected)
            for part in stored.parts
        }
        self._check_tied_copies(family)

    def names(self) -> Sequence[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        entry = self._entries[name]
        return entry.stored.read_part(
            name.removeprefix(f"{MODEL}."), start, size, lambda *part: self._files.read(entry.file_name, *part)
        )

    def model_config(self) -> ModelConfig:
        return self._model

    def model_name(self) -> str | None:
        """None for a Llama: the format does not record which of its generations a model belongs to."""
        model_type = self.config["model_type"]
        return None if model_type == LLAMA.model_type else model_type

    def tokenizer(self) -> TokenizerIdentity | None:
        return first_identity((self.path,))

    def state(self) -> RunState | None:
        return None

    def _check(self, family: Family, expected: Mapping[str, StoredTensor], file_names: Mapping[str, str]) -> None:
        stored = self._files.tensors
        missing = [f"{name} is missing" for name in expected if name not in file_names]
        found = [(expected[name], stored[file_name]) for name, file_name in file_names.items()]
        shapes = [
            f"{tensor.name} has shape {list(tensor.shape)} in {tensor.file.name}, not {list(wanted.shape)}"
            for wanted, tensor in found
            if tensor.shape != wanted.shape
        ]
        used = {*file_names.values(), *self._tied_copies(family)}
        extra = [
            f"{name} in {tensor.file.name} has no place in the model"
            for name, tensor in stored.items()
            if name not in used and not family.is_ignored(name)
        ]
        if problems := [*missing, *shapes, *extra]:
            raise CheckpointError(
                f"{self.path} does not hold the model that its {CONFIG_FILE} describes: {listed(problems)}. "
                "Download or save the folder again."
            )
        for _, tensor in found:
            if tensor.dtype not in DTYPES or not DTYPES[tensor.dtype].is_floating_point:
                raise CheckpointError(
                    f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}; use the model in bf16, fp16 or fp32."
                )

    def _tied_copies(self, family: Family) -> Mapping[str, str]:
        return family.tied_copies if self._model.tie_embed_logits else {}

    def _check_tied_copies(self, family: Family) -> None:
        """A head that is stored although it is tied must be the embedding: else which one counts would be a guess."""
        for copy, part in self._tied_copies(family).items():
            tensor, entry = self._files.tensors.get(copy), self._entries[f"{MODEL}.{part}"]
            if tensor is not None and not self._are_equal(tensor, self._files.tensors[entry.file_name]):
                raise CheckpointError(
                    f"{tensor.file} holds {copy}, which differs from {entry.file_name}, but "
                    f"{self.path / CONFIG_FILE} says that they are tied; "
                    'set "tie_word_embeddings": false there, or remove the tensor.'
                )

    def _are_equal(self, a: FileTensor, b: FileTensor) -> bool:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        num_rows, columns = a.shape[0], a.shape[1:]
        step = max(1, _COMPARED_BYTES // (math.prod(columns) * DTYPES[a.dtype].itemsize))
        origin = (0,) * len(columns)
        parts = (((row, *origin), (min(step, num_rows - row), *columns)) for row in range(0, num_rows, step))
        return all(torch.equal(self._files.read(a.name, *part), self._files.read(b.name, *part)) for part in parts)


def carried_files(source: Source) -> dict[str, dict[str, Any]]:
    """What `RunState.config` of a checkpoint made from `source` must hold for an export to give its files back."""
    if isinstance(source, HuggingFaceSource):
        files = [(key, source.path / name) for key, name in CARRIED_FILES]
        return {key: read_json(file) for key, file in files if file.exists()}
    state = source.state()
    carried = {} if state is None else {key: state.config.get(key) for key, _ in CARRIED_FILES}
    return {key: dict(file) for key, file in carried.items() if isinstance(file, Mapping)}


def _file_names(
    family: Family, expected: Mapping[str, StoredTensor], stored: Mapping[str, FileTensor]
) -> dict[str, str]:
    """Expected name -> name in the files, for what is there: without the prefix, perhaps, or with an older ending."""
    names = {}
    for found in stored:
        candidates = [found, family.prefix + found]
        for old, new in family.renamed.items():
            candidates += [name.removesuffix(old) + new for name in candidates if name.endswith(old)]
        names.update({name: found for name in candidates if name in expected and name not in names})
    return {name: names[name] for name in expected if name in names}
