"""Where the files of a tree lie, and what is in them besides the tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from megatron.checkpoint.legacy.keys import flat_tensors
from megatron.checkpoint.locate import TRACKER_FILE, iteration_folder
from megatron.checkpoint.unpickle import read_torch_file
from megatron.errors import CheckpointError, listed

RELEASE: Final = "release"
# That of runs which kept the optimizer's state in files of its own.
DISTRIBUTED_FILE: Final = "model_rng.pt"
MODEL_FILES: Final = ("model_optim_rng.pt", DISTRIBUTED_FILE)
# Converters leave a SentencePiece model beside the tree.
TOKENIZER_FILE: Final = "tokenizer.model"

_RANK_NAME: Final = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")


@dataclass(frozen=True)
class Tree:
    """The files of one iteration by (pipeline rank, tensor rank). `iteration` is None for a release."""

    folder: Path
    iteration: int | None
    files: Mapping[tuple[int, int], Path]

    @property
    def tp(self) -> int:
        return max(tensor for _, tensor in self.files) + 1

    @property
    def pp(self) -> int:
        return max(pipeline for pipeline, _ in self.files) + 1

    def check_complete(self, tp: int | None, pp: int | None) -> None:
        """Raises CheckpointError unless there is a file for every rank of the recorded sizes, and no other."""
        ranks = {(p, t) for p in range(pp or self.pp) for t in range(tp or self.tp)}
        absent = [rank_name(p, t, pp or self.pp) for p, t in sorted(ranks - self.files.keys())]
        if absent:
            raise CheckpointError(
                f"{self.folder} was saved by {tp or self.tp} tensor and {pp or self.pp} pipeline ranks, and "
                f"{listed(absent, ', ')} {'is' if len(absent) == 1 else 'are'} missing; copy the whole folder again."
            )
        extra = [self.files[rank].parent.name for rank in sorted(self.files.keys() - ranks)]
        if extra:
            raise CheckpointError(
                f"{self.folder} was saved by {tp or self.tp} tensor and {pp or self.pp} pipeline ranks, and holds "
                f"{listed(extra, ', ')} besides; remove what is left of another checkpoint."
            )


def is_legacy_tree(path: Path) -> bool:
    """`path` is the folder of a run that holds such trees, or that of one iteration."""
    # No other folder is looked into: a rank that begins to save leaves and removes some of its own.
    return any(_rank_files(folder) for folder in (path, path / RELEASE, *path.glob("iter_*")))


def find_tree(path: Path, iteration: int | None = None) -> Tree:
    """The tree of `iteration` (0: the release), by default the one the tracker names; `path` may be the tree itself.

    Raises CheckpointError that says what was found instead.
    """
    if files := _rank_files(path):
        stored = _iteration_of(path.name)
        if iteration is not None and iteration != (stored or 0):
            raise CheckpointError(f"--load_iters {iteration}: {path} is {path.name}; give its parent folder.")
        return Tree(path, stored, files)
    name = _tracked_name(path) if iteration is None else RELEASE if iteration == 0 else _folder_name(path, iteration)
    files = _rank_files(path / name)
    if not files:
        named_by = f"{path / TRACKER_FILE} names it" if iteration is None else f"--load_iters {iteration} asks for it"
        found = sorted(folder.name for folder in (path / RELEASE, *path.glob("iter_*")) if _rank_files(folder))
        raise CheckpointError(
            f"{path / name} holds no mp_rank_XX/{MODEL_FILES[0]}, but {named_by}; choose one with --load_iters: "
            f"found {listed(found, ', ') or 'none'}."
        )
    return Tree(path / name, _iteration_of(name), files)


def rank_name(pipeline_rank: int, tensor_rank: int, pp: int) -> str:
    return f"mp_rank_{tensor_rank:02d}" + (f"_{pipeline_rank:03d}" if pp > 1 else "")


def read_rank(file: Path) -> dict[str, Any]:
    """Everything in a rank's file. Raises CheckpointError if that is no checkpoint."""
    return check_rank(read_torch_file(file), file)


def check_rank(state: object, file: Path) -> dict[str, Any]:
    """`state` if it is that of a checkpoint. Raises CheckpointError."""
    if not isinstance(state, dict) or not _chunk_names(state):
        raise CheckpointError(f"{file} holds no model; it is no checkpoint of Megatron-LM or Megatron-LLM.")
    return state


def chunks_of(state: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The tensors of a rank's model chunks, one unless it was trained with interleaved stages."""
    return [flat_tensors(state[name]) for name in _chunk_names(state)]


def _chunk_names(state: Mapping[str, Any]) -> list[str]:
    names = ["model"] if "model" in state else [f"model{i}" for i in range(len(state)) if f"model{i}" in state]
    return [name for name in names if isinstance(state[name], Mapping)]


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    files = {}
    for name in MODEL_FILES:
        for file in sorted(folder.glob(f"mp_rank_*/{name}")):
            if match := _RANK_NAME.fullmatch(file.parent.name):
                files[int(match[2] or 0), int(match[1])] = file
    return files


def _tracked_name(root: Path) -> str:
    tracker = root / TRACKER_FILE
    try:
        content = tracker.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{tracker} cannot be read ({error.strerror}); name an iteration with --load_iters, or give its folder."
        ) from error
    text = content.strip().decode(errors="replace")
    if text != RELEASE and not re.fullmatch(r"\d{1,15}", text):
        raise CheckpointError(
            f"{tracker} holds {content[:40]!r}, which is neither an iteration nor {RELEASE}; "
            "name one with --load_iters, or give its folder."
        )
    return RELEASE if text == RELEASE else _folder_name(root, int(text))


def _folder_name(root: Path, iteration: int) -> str:
    return iteration_folder(root, iteration).name


def _iteration_of(name: str) -> int | None:
    match = re.fullmatch(r"iter_(\d+)", name)
    return int(match[1]) if match else None
