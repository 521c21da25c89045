"""The copy of a tokenizer beside checkpoints: each of its files is the old one or the new one, whole and durable."""

from __future__ import annotations

import filecmp
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron.checkpoint.locate import STAGING_PREFIX
from megatron.checkpoint.tokenizer_files import holds_tokenizer, tokenizer_files
from megatron.durable import sync_file, sync_folder
from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)


def copy_tokenizer(files: Mapping[str, Path], folder: Path, *, may_replace: bool) -> None:
    """Copies `files`, by their new names, to `folder`, whose parent the caller owns; what is there already stays.

    Another tokenizer in `folder` belongs to the checkpoints beside it. With `may_replace` its files are replaced with
    a warning, without they are a CheckpointError and stay. Raises CheckpointError if a copy fails.
    """
    if not files:
        return
    try:
        others = _other_files(files, folder)
        if others and not may_replace:
            raise CheckpointError(
                f"{folder} holds another tokenizer (its {', '.join(others)}), which the checkpoints beside it need; "
                "choose another folder to save to."
            )
        if others:
            logger.warning(
                "%s held another tokenizer (its %s), which is replaced; earlier checkpoints beside it do not fit the "
                "new one",
                *(folder, ", ".join(others)),
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            _copy(file, folder / name)
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer cannot be copied to {folder} ({error.strerror}); choose another folder to save to."
        ) from error


def _other_files(files: Mapping[str, Path], folder: Path) -> list[str]:
    """The names in `folder` that are of another tokenizer."""
    held = tokenizer_files(folder) if holds_tokenizer(folder) else {}
    different = {name for name, file in files.items() if (folder / name).exists() and not _same(file, folder / name)}
    return sorted((held.keys() - files.keys()) | different)


def _copy(file: Path, target: Path) -> None:
    if target.exists() and _same(file, target):
        sync_file(target)  # whoever wrote it may have been stopped before it was durable
        return
    temporary = target.with_name(f"{STAGING_PREFIX}{target.name}")  # one name: what a crash leaves is written over
    try:
        shutil.copyfile(file, temporary)
        sync_file(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _same(one: Path, other: Path) -> bool:
    return filecmp.cmp(one, other, shallow=False)
