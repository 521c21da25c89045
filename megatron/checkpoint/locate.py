"""Where the iterations of a run lie, and which of them is the latest."""

from __future__ import annotations

import re
from pathlib import Path

from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
# What a save or a removal leaves under such a name is swept by the next save.
STAGING_PREFIX = ".tmp-"
# An export belongs to no run: it may lie, and be written, in the folder that a run saves to.
EXPORT_PREFIX = ".export-"

_ITERATION_NAME = re.compile(r"iter_(\d{7,})")
_SHARD_NAME = re.compile(r"rank_\d{5,}\.safetensors")
_REPLACED = ".replaced"


def iteration_folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration that a folder is named after, None if after none."""
    match = _ITERATION_NAME.fullmatch(folder.name.removesuffix(_REPLACED))
    return int(match.group(1)) if match else None


def replaced_folder(folder: Path) -> Path:
    """Where an iteration lies for the moment in which a new version of it takes its place."""
    return folder.with_name(folder.name + _REPLACED)


def list_iterations(root: Path) -> list[int]:
    """The complete checkpoints under `root`, ascending."""
    folders = (path.parent for path in root.glob(f"iter_*/{MANIFEST_FILE}") if not path.parent.name.endswith(_REPLACED))
    return sorted(iteration for iteration in map(iteration_of, folders) if iteration is not None)


def list_folders(root: Path) -> list[int]:
    """The iterations of which `root` has a folder, complete or not, ascending."""
    return sorted({iteration for iteration in map(iteration_of, root.glob("iter_*")) if iteration is not None})


def complete_folder(root: Path, iteration: int) -> Path | None:
    """Where the checkpoint of `iteration` lies, None if there is none."""
    folder = iteration_folder(root, iteration)
    candidates = (folder, replaced_folder(folder))  # the latter alone after a crash between two renames
    return next((candidate for candidate in candidates if (candidate / MANIFEST_FILE).exists()), None)


def is_foreign(folder: Path) -> bool:
    """Whether something lies at `folder` that no save has made: other than a checkpoint, or what is left of one."""
    if not folder.is_dir():
        return folder.exists()
    is_checkpoint = (folder / MANIFEST_FILE).exists()
    return not is_checkpoint and not all(_SHARD_NAME.fullmatch(entry.name) for entry in folder.iterdir())


def read_tracker(root: Path) -> int:
    """The iteration that `root` names as its latest. Raises CheckpointError if it names none."""
    tracker = root / TRACKER_FILE
    try:
        content = tracker.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{tracker} cannot be read ({error.strerror}); name an iteration with --load_iters: {_found(root)}."
        ) from error
    if not re.fullmatch(rb"\s*\d{1,15}\s*", content):
        raise CheckpointError(
            f"{tracker} holds {content[:40]!r}, which is not an iteration; "
            f"write one into it or name one with --load_iters: {_found(root)}."
        )
    return int(content)


def find_checkpoint(root: Path, iteration: int | None = None) -> Path:
    """The folder of `iteration`, by default of the one the tracker names. Raises CheckpointError if there is none."""
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a folder; give one that a run saved to.")
    wanted = read_tracker(root) if iteration is None else iteration
    folder = complete_folder(root, wanted)
    if folder is not None:
        return folder
    named_by = f"{root / TRACKER_FILE} names" if iteration is None else "--load_iters asks for"
    raise CheckpointError(
        f"{named_by} iteration {wanted}, but {iteration_folder(root, wanted) / MANIFEST_FILE} does not exist; "
        f"choose another with --load_iters: {_found(root)}."
    )


def _found(root: Path) -> str:
    iterations = list_iterations(root)
    return f"found {', '.join(map(str, iterations))}" if iterations else "found none"
