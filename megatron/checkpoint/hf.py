"""A Hugging Face folder, read as a source of weights.

The files are checked against config.json when the folder is opened: every tensor the model has is there, with its
shape, and nothing else is. Slices are read when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.container import DTYPES
from megatron.checkpoint.hf_config import family_of, model_config_from_hf
from megatron.checkpoint.hf_rules import Family
from megatron.checkpoint.source import MODEL, RunState, Source, TokenizerIdentity
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Axis
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig
from megatron.model.stage import Stage, StageOptions

CONFIG_FILE: Final = "config.json"
GENERATION_FILE: Final = "generation_config.json"
WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

# Under these keys of `RunState.config` a checkpoint carries the files of the model it was made from.
CARRIED_FILES: Final = (("hf_config", CONFIG_FILE), ("hf_generation_config", GENERATION_FILE))

_EMBEDDING, _HEAD = "embedding.word.weight", "head.weight"
_MAX_LISTED = 8
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class _Stored:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class HuggingFaceSource:
    """See `Source`. Raises CheckpointError naming file and tensor where config.json and the files disagree."""

    def __init__(self, path: Path):
        self.path = path
        config_file = path / CONFIG_FILE
        self.config = _read_json(config_file)
        self._model = model_config_from_hf(self.config, str(config_file))
        family = family_of(self.config)
        stored = _open_weights(path)
        names = {f"{MODEL}.{native}": family.hf_name(native) for native in logical_shapes(self._model)}
        self._check(family, stored)
        self._names = names
        self._stored = stored

    def names(self) -> Sequence[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[self._names[name]].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[self._names[name]].dtype

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return _read(self._stored, self._names[name], start, size)

    def model_config(self) -> ModelConfig:
        return self._model

    def model_name(self) -> str | None:
        """None: the format does not record which of a family's generations a model belongs to."""
        return None

    def tokenizer(self) -> TokenizerIdentity | None:
        if (self.path / "tokenizer.json").exists():
            return TokenizerIdentity("HuggingFaceTokenizer", str(self.path))
        if (self.path / "tokenizer.model").exists():
            return TokenizerIdentity("SentencePieceTokenizer", str(self.path / "tokenizer.model"))
        return None

    def state(self) -> RunState | None:
        return None

    def _check(self, family: Family, stored: Mapping[str, _Stored]) -> None:
        expected = {family.hf_name(native): shape for native, shape in logical_shapes(self._model).items()}
        missing = [f"{name} is missing" for name in expected if name not in stored]
        shapes = [
            f"{name} has shape {list(stored[name].shape)} in {stored[name].file.name}, not {list(shape)}"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ]
        extra = [
            f"{name} in {tensor.file.name} has no place in the model"
            for name, tensor in stored.items()
            if name not in expected and not family.is_ignored(name) and not self._is_tied_head(family, name)
        ]
        if problems := [*missing, *shapes, *extra]:
            raise CheckpointError(
                f"{self.path} does not hold the model that its {CONFIG_FILE} describes: {_listed(problems)}. "
                "Download or save the folder again."
            )
        if self._model.tie_embed_logits and family.hf_name(_HEAD) in stored:
            _check_tied(self.path, stored, family.hf_name(_EMBEDDING), family.hf_name(_HEAD))

    def _is_tied_head(self, family: Family, hf_name: str) -> bool:
        return self._model.tie_embed_logits and hf_name == family.hf_name(_HEAD)


def logical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every logical tensor of a model, as the model itself declares them, first layer first."""
    options = StageOptions(padded_vocab_size=config.vocab_size)
    with torch.device("meta"):
        model = Stage(
            config, range(config.num_layers), is_first=True, is_last=True, axis=Axis("serial"), options=options
        )
    return {block.name: block.global_shape for spec in shard_specs(model).values() for block in spec.blocks}


def carried_files(source: Source) -> dict[str, dict[str, Any]]:
    """What `RunState.config` of a checkpoint made from `source` must hold for an export to give its files back."""
    if isinstance(source, HuggingFaceSource):
        files = [(key, source.path / name) for key, name in CARRIED_FILES]
        return {key: _read_json(file) for key, file in files if file.exists()}
    state = source.state()
    carried = {} if state is None else {key: state.config.get(key) for key, _ in CARRIED_FILES}
    return {key: dict(file) for key, file in carried.items() if isinstance(file, Mapping)}


def _open_weights(path: Path) -> dict[str, _Stored]:
    """Every tensor of the folder by name. A single file counts before an index, as it does in transformers."""
    if (path / WEIGHTS_FILE).exists():
        return _read_header(path / WEIGHTS_FILE)
    if not (path / INDEX_FILE).exists():
        pickled = " It has pickled weights only: save the model again as safetensors." * any(path.glob("*.bin"))
        raise CheckpointError(
            f"{path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a folder with safetensors weights.{pickled}"
        )
    return _open_shards(path)


def _open_shards(path: Path) -> dict[str, _Stored]:
    index_file = path / INDEX_FILE
    file_of = _read_json(index_file).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise CheckpointError(f"{index_file} has no weight_map from tensors to files; download it again.")
    files = sorted(set(file_of.values()))
    if absent := [file for file in files if not (path / file).is_file()]:
        raise CheckpointError(
            f"{index_file} names {_listed(absent)}, which {'is' if len(absent) == 1 else 'are'} missing in {path}; "
            "download the missing files."
        )
    stored: dict[str, _Stored] = {}
    problems = []
    for file in files:
        held = _read_header(path / file)
        problems += [f"{name} is not in {file}" for name, f in file_of.items() if f == file and name not in held]
        problems += [f"{file} holds {name}, which the index does not say" for name in held if file_of.get(name) != file]
        stored |= held
    if problems:
        raise CheckpointError(f"{index_file} and the files disagree: {_listed(problems)}. Download the folder again.")
    return stored


def _read_header(file: Path) -> dict[str, _Stored]:
    """The tensors of a file, whose size is checked against its header."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            entries = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is no complete safetensors file ({error}); it was cut off or damaged: download it again."
        ) from error
    for name, (dtype, _) in entries.items():
        if dtype not in DTYPES or not DTYPES[dtype].is_floating_point:
            raise CheckpointError(f"{file}: {name} has dtype {dtype}; use the model in bf16, fp16 or fp32.")
    return {name: _Stored(file, DTYPES[dtype], shape) for name, (dtype, shape) in entries.items()}


def _read(stored: Mapping[str, _Stored], name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
    file = stored[name].file
    slices = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    try:
        # Opened for one read: the pages of a file that stays mapped would count as memory of this process.
        with safe_open(file, framework="pt") as opened:
            # A copy of its own: the slice is a view of the file.
            return opened.get_slice(name)[slices].clone(memory_format=torch.contiguous_format)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read ({error}); download the file again.") from error


def _check_tied(path: Path, stored: Mapping[str, _Stored], embedding: str, head: str) -> None:
    """A head that is stored although it is tied must be the embedding: else which of them counts would be a guess."""
    rows, columns = stored[embedding].shape
    for row in range(0, rows, _COMPARED_ROWS):
        part = (row, 0), (min(_COMPARED_ROWS, rows - row), columns)
        if stored[head].shape != stored[embedding].shape or not torch.equal(
            _read(stored, embedding, *part), _read(stored, head, *part)
        ):
            raise CheckpointError(
                f"{stored[head].file} holds a {head} that differs from {embedding}, but {path / CONFIG_FILE} says "
                'that they are tied; set "tie_word_embeddings": false there, or remove the tensor.'
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); give a Hugging Face model folder.") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object; download it again.")
    return content


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    more = f"; and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return "; ".join(items[:_MAX_LISTED]) + more
