"""Which checkpoints of a run can be loaded, and the newest of them.

What is looked at when a checkpoint is opened costs little: the manifest and its checksum, that the pieces of every
entry cover it, and for every file that it is there, its size, and the checksum of its header. The checksums of the
data are verified when it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron.checkpoint.locate import complete_folder, list_folders, read_tracker
from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.verified_file import VerifiedFile
from megatron.errors import CheckpointError, DamagedCheckpointError

logger = logging.getLogger(__name__)


def open_checked(folder: Path) -> NativeSource:
    """Opens an iteration's folder. Raises DamagedCheckpointError where what is looked at is not what was written."""
    source = NativeSource(folder)
    for name, record in source.manifest.files.items():
        VerifiedFile(folder, name, record)
    return source


def newest_valid(root: Path, damaged: Mapping[Path, str]) -> NativeSource:
    """The checkpoint that the tracker of `root` names, or the newest valid one where that cannot be loaded.

    `damaged` says of iterations' folders what is known to be wrong with them. A warning names what was skipped and
    why. Raises CheckpointError where nothing is left, and where a checkpoint is whole but of another program version.
    """
    skipped: list[str] = []
    tracked = _tracked(root, skipped)
    for iteration in _order(list_folders(root), tracked):
        folder = complete_folder(root, iteration)
        try:
            if folder is None:
                raise DamagedCheckpointError(f"iter_{iteration:07d}/{MANIFEST_FILE} does not exist.")
            if folder in damaged:
                raise DamagedCheckpointError(damaged[folder])
            source = open_checked(folder)
        except DamagedCheckpointError as error:
            skipped.append(f"iteration {iteration}: {error}")
            continue
        if skipped:
            logger.warning("%s: loading iteration %d, because of %s", root, iteration, " | ".join(skipped))
        elif iteration < (latest := max(list_folders(root))):
            logger.warning(
                "%s: loading iteration %d, which the tracker names, though there are later ones (up to %d): the run "
                "went back, or was interrupted while saving; name another with --load_iters",
                *(root, iteration, latest),
            )
        return source
    raise CheckpointError(
        f"{root} holds no checkpoint that can be loaded: {' | '.join(skipped)} "
        "Restore the files, or start anew in another folder."
    )


def _tracked(root: Path, skipped: list[str]) -> int | None:
    try:
        return read_tracker(root)
    except CheckpointError as error:
        skipped.append(f"the tracker: {error}")
        return None


def _order(found: list[int], tracked: int | None) -> Iterator[int]:
    """The tracked iteration, then those before it, the latest first.

    Iterations after it are of a run that was given up for an earlier point, so they come last.
    """
    if tracked is None:
        yield from sorted(found, reverse=True)
        return
    yield tracked
    yield from sorted((iteration for iteration in found if iteration < tracked), reverse=True)
    yield from sorted((iteration for iteration in found if iteration > tracked), reverse=True)
