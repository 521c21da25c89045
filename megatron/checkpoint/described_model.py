"""The file that says what model a training program's checkpoint holds, and where it is looked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron.checkpoint.hf import CONFIG_FILE
from megatron.checkpoint.hf_files import read_json
from megatron.checkpoint.meta_params import PARAMS_FILE, read_params
from megatron.errors import CheckpointError

# What llama-recipes writes beside its checkpoints: the name of the model, but nothing of its architecture.
_RECIPE_FILE: Final = "train_params.yaml"
_MODEL_NAME = re.compile(r"^model_name:\s*(\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Description:
    """Hugging Face's config.json or Meta's params.json."""

    file: Path
    content: Mapping[str, Any]

    @property
    def is_params(self) -> bool:
        return self.file.name == PARAMS_FILE


def find_description(checkpoint: Path, config: Path | None) -> Description:
    """`config`, a file or the folder with one; by default that in the checkpoint's folder, or in the folder above.

    Raises CheckpointError that says what is missing.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.absolute().parent
    places = [folder, folder.absolute().parent] if config is None else [config]
    candidates = [place / name for place in places if place.is_dir() for name in (CONFIG_FILE, PARAMS_FILE)]
    candidates += [place for place in places if place.is_file()]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        where = f"{folder} or the folder above" if config is None else str(config)
        raise CheckpointError(
            f"{checkpoint} does not say what model it holds, and there is no {CONFIG_FILE} or {PARAMS_FILE} in {where};"
            f" put the {CONFIG_FILE} of {_trained_model(folder)} there."
        )
    return Description(file, read_params(file) if file.name == PARAMS_FILE else read_json(file))


def _trained_model(folder: Path) -> str:
    recipe = folder / _RECIPE_FILE
    named = _MODEL_NAME.search(recipe.read_text(encoding="utf-8", errors="replace")) if recipe.is_file() else None
    return f"{named[1]}, which {_RECIPE_FILE} names," if named else "the Hugging Face model that was trained"
