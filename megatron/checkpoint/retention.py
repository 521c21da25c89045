"""Which checkpoints of a run stay when a new one is complete."""

from __future__ import annotations

import logging
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.locate import STAGING_PREFIX, iteration_folder, list_iterations
from megatron.checkpoint.validity import open_checked
from megatron.durable import sync_folder
from megatron.errors import CheckpointError, DamagedCheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Keep the latest `keep_last` valid checkpoints, and the one in the folder `loaded`, from which the run started."""

    keep_last: int
    loaded: Path | None = None


def remove_old(saved: Path, retention: Retention) -> list[Path]:
    """Removes what lies before the latest checkpoints up to `saved`, the new one; returns what is gone.

    Valid is what `open_checked` finds so: manifest, and presence, size and header of every file, read back from the
    disk; the data is not read again. A damaged checkpoint does not count; one that this version of the program cannot
    read does not count either, and never goes. Raises DamagedCheckpointError, and removes nothing, if the new one is
    damaged. Iterations after `saved` belong to a run that was given up for an earlier point: they neither count nor go.
    """
    open_checked(saved)
    root, iteration = saved.parent, int(saved.name.removeprefix("iter_"))
    num_valid, removed = 1, []
    for folder in (iteration_folder(root, number) for number in reversed(list_iterations(root)) if number < iteration):
        is_valid, is_readable = _judge(folder)
        if num_valid < retention.keep_last:
            num_valid += is_valid
        elif is_readable and (retention.loaded is None or folder.resolve() != retention.loaded.resolve()):
            removed += [folder] if _remove(folder) else []
    return removed


def _judge(folder: Path) -> tuple[bool, bool]:
    """Whether a checkpoint is valid, and whether it is one that this version of the program reads, or a damaged one."""
    try:
        open_checked(folder)
    except CheckpointError as error:
        return False, isinstance(error, DamagedCheckpointError)
    return True, True


def _remove(folder: Path) -> bool:
    """Under a hidden name first, durably: what a crash leaves half removed must not look like a checkpoint."""
    hidden = folder.with_name(f"{STAGING_PREFIX}removed-{uuid.uuid4().hex}")
    try:
        folder.rename(hidden)
        sync_folder(folder.parent)
        shutil.rmtree(hidden)
    except OSError as error:
        left = hidden if hidden.exists() else folder
        logger.warning("%s is an old checkpoint that cannot be removed (%s); remove it by hand", left, error.strerror)
        return False
    return True
