"""The state dictionary of a training program, read as a source: weights, Adam's moments, and the step.

Two kinds of files hold one: trees of torch.distributed.checkpoint (torchtitan, FSDP, llama-recipes, Accelerate) and
single files of torch.save ("full state dict"). Neither says what model it is; see `described_model`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from megatron.checkpoint.dcp_metadata import METADATA_FILE
from megatron.checkpoint.dcp_tensors import DcpTensors
from megatron.checkpoint.described_model import Description, find_description
from megatron.checkpoint.foreign_names import HuggingFaceTensors, below, find_prefix, is_repeated, unwrapped, without
from megatron.checkpoint.hf import CARRIED_FILES, CONFIG_FILE
from megatron.checkpoint.hf_config import family_of, model_config_from_hf
from megatron.checkpoint.hf_family import Family
from megatron.checkpoint.meta_names import EMBEDDING, HEAD, IGNORED, MetaTensors
from megatron.checkpoint.meta_params import model_config_from_params
from megatron.checkpoint.named_tensors import NamedTensors, Renamed
from megatron.checkpoint.placement import logical_shapes
from megatron.checkpoint.source import JSON, MODEL, RunState, TokenizerIdentity
from megatron.checkpoint.tokenizer_files import first_identity
from megatron.checkpoint.torch_files import TorchFile
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig

logger = logging.getLogger(__name__)

ModelTensors: TypeAlias = HuggingFaceTensors | MetaTensors

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_STEP_FOLDER = re.compile(r"step-(\d+)")
_PROGRESS: Final = "train_state.step"


def open_dcp(path: Path, iteration: int | None = None, *, config: Path | None = None) -> StateDictSource:
    """A tree of torch.distributed.checkpoint, or the latest of several in folders named ``step-<number>``.

    Raises CheckpointError where it is damaged, incomplete, of an unknown model, or would run a program.
    """
    if (path / METADATA_FILE).is_file():
        if iteration is not None:
            raise CheckpointError(
                f"--load_iters {iteration}: {path} is one checkpoint; drop it or give the folder above."
            )
        return StateDictSource(DcpTensors(path), config)
    steps = dcp_steps(path)
    wanted = max(steps, default=None) if iteration is None else iteration
    if wanted not in steps:
        found = f"found {', '.join(map(str, sorted(steps)))}" if steps else "found none"
        asked = "" if iteration is None else f"--load_iters {iteration}: "
        raise CheckpointError(f"{asked}{path} holds no such tree of torch.distributed.checkpoint; {found}.")
    return StateDictSource(DcpTensors(steps[wanted]), config)


def dcp_steps(path: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder of torchtitan."""
    folders = {file.parent for file in path.glob(f"step-*/{METADATA_FILE}")}
    return {int(match[1]): folder for folder in folders if (match := _STEP_FOLDER.fullmatch(folder.name))}


def open_torch_file(path: Path, *, config: Path | None = None) -> StateDictSource:
    """A file of torch.save that holds a state dictionary. Raises CheckpointError as `open_dcp` does."""
    return StateDictSource(TorchFile(path), config)


class StateDictSource:
    """See `Source`. `config` names the file that describes the model, or its folder, where it does not lie beside."""

    def __init__(self, tensors: NamedTensors, config: Path | None = None):
        self.path = tensors.path
        self._stored = unwrapped(tensors)
        self._description = find_description(tensors.path, config)
        prefix = find_prefix(self._stored, EMBEDDING)
        if prefix is not None:
            self._weights, self._model, self._family = _metas_weights(self._stored, prefix, self._description)
        else:
            self._weights, self._model, self._family = _hugging_faces_weights(self._stored, self._description)
        self._shapes = logical_shapes(self._model)
        self._tensors = {MODEL: self._named(self._weights)}
        self._num_steps: int | None = None
        self._add_moments()

    def names(self) -> Sequence[str]:
        return [f"{kind}.{name}" for kind, tensors in self._tensors.items() for name in tensors.names()]

    def shape(self, name: str) -> tuple[int, ...]:
        tensors, logical = self._entry(name)
        return tensors.shape(logical)

    def dtype(self, name: str) -> torch.dtype:
        tensors, logical = self._entry(name)
        return tensors.dtype(logical)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        tensors, logical = self._entry(name)
        return tensors.read(logical, start, size)

    def model_config(self) -> ModelConfig:
        return self._model

    def model_name(self) -> str | None:
        """None: nothing records which of a family's generations a model belongs to."""
        return None

    def tokenizer(self) -> TokenizerIdentity | None:
        folder = self.path if self.path.is_dir() else self.path.absolute().parent
        return first_identity((folder, self._description.file.absolute().parent))

    def state(self) -> RunState | None:
        """The step, where the optimizer's state says one; the place in the data is not known, nor the seed."""
        carried: dict[str, JSON] = {}
        if not self._description.is_params:
            carried = {key: self._description.content for key, file in CARRIED_FILES if file == CONFIG_FILE}
        if self._num_steps is None:
            return RunState(iteration=0, config=carried) if carried else None
        name = next((name for name in self._stored.names() if f".{name}".endswith(f".{_PROGRESS}")), None)
        iteration = self._num_steps if name is None else int(self._scalar(name))
        return RunState(iteration, optimizer={"name": "adam", "num_steps": self._num_steps}, config=carried)

    def _entry(self, name: str) -> tuple[ModelTensors, str]:
        kind = next(kind for kind in self._tensors if name.startswith(f"{kind}."))
        return self._tensors[kind], name.removeprefix(f"{kind}.")

    def _named(self, stored: NamedTensors) -> ModelTensors:
        described_by = self._description.file.name
        if self._family is None:
            return MetaTensors(stored, self._model, self._shapes, described_by)
        return HuggingFaceTensors(stored, self._family, self._model, self._shapes, described_by)

    def _add_moments(self) -> None:
        """Adam's state, if it lies there tensor by tensor: weights only otherwise, and a word about it."""
        first = self._weights.names()[0]
        prefixes = {moment: find_prefix(self._stored, first, suffix=f".{moment}") for moment in _MOMENTS}
        if None in prefixes.values():
            return
        moments = {m: {name: f"{prefixes[m]}{name}.{m}" for name in self._weights.names()} for m in _MOMENTS}
        steps = [f"{prefixes[_MOMENTS[0]]}{name}.step" for name in self._weights.names()]
        defect = self._defect(moments, steps)
        if defect is not None:
            logger.warning("%s: weights only, since its optimizer's state cannot be used (%s)", self.path, defect)
            return
        self._tensors |= {f"optimizer.{m}": self._named(Renamed(self._stored, moments[m])) for m in _MOMENTS}
        self._num_steps = int(self._scalar(steps[0]))
        logger.info(
            "%s: with Adam's state after %d steps; its place in the data is not known", self.path, self._num_steps
        )

    def _defect(self, moments: dict[str, dict[str, str]], steps: Sequence[str]) -> str | None:
        stored = set(self._stored.names())
        for names in moments.values():
            for name, moment in names.items():
                if moment not in stored:
                    return f"{moment} is missing"
                if self._stored.shape(moment) != self._weights.shape(name):
                    return f"{moment} has another shape than {name}"
        if absent := [step for step in steps if step not in stored]:
            return f"{absent[0]} is missing or no tensor"
        if len({self._scalar(step) for step in steps}) > 1:
            return "tensors differ in their number of steps"
        return None

    def _scalar(self, name: str) -> float:
        shape = self._stored.shape(name)
        return self._stored.read(name, (0,) * len(shape), (1,) * len(shape)).item()


_Weights: TypeAlias = tuple[Renamed, ModelConfig, Family | None]


def _metas_weights(stored: NamedTensors, prefix: str, description: Description) -> _Weights:
    """The weights under Meta's names, and their model."""
    weights = without(below(stored, prefix, (EMBEDDING, HEAD, "layers", "norm")), IGNORED.__contains__)
    is_repeated_head = is_repeated(weights, EMBEDDING, HEAD)
    if description.is_params:
        tied = HEAD not in weights.names() or is_repeated_head
        rows = weights.shape(EMBEDDING)[0]
        model = model_config_from_params(description.content, description.file, vocab_size=rows, tied=tied)
    else:
        model = model_config_from_hf(description.content, str(description.file))
    if model.tie_embed_logits and is_repeated_head:
        weights = without(weights, HEAD.__eq__)
    return weights, model, None


def _hugging_faces_weights(stored: NamedTensors, description: Description) -> _Weights:
    """The weights under the names of the family in config.json, and their model."""
    if description.is_params:
        raise CheckpointError(
            f"{stored.path} has no {EMBEDDING}, so that its tensors are not those that {description.file} describes; "
            f"give the model's {CONFIG_FILE}."
        )
    family = family_of(description.content, str(description.file))
    model = model_config_from_hf(description.content, str(description.file))
    embedding, head = (
        f"{next(module.name for module in family.modules if part in module.parts)}.weight"
        for part in ("embedding.word", "head")
    )
    prefix = find_prefix(stored, embedding)
    if prefix is None:
        raise CheckpointError(
            f"{stored.path} has neither {embedding}, as {description.file} says, nor {EMBEDDING}; "
            f"give the checkpoint and the {CONFIG_FILE} of one model."
        )
    modules = [module.name for module in family.modules]
    weights = without(below(stored, prefix, modules), family.is_ignored)
    if model.tie_embed_logits and is_repeated(weights, embedding, head):
        weights = without(weights, head.__eq__)
    return weights, model, family
