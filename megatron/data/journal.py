"""How far an unfinished run came: the same journal in the folder of every dataset that it writes.

A journal speaks of all these datasets at once, so it counts only where it is beside each of them: another run may have
written to some of them since.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.durable import sync_file, sync_folder
from megatron.errors import DataError

JOURNAL = "journal.json"
JOURNAL_VERSION = 2


@dataclass(frozen=True)
class Journal:
    """Of `run`: its request, its own notes, and the bytes of each file of each dataset that count."""

    run: str
    request: dict[str, Any]
    notes: dict[str, Any]
    num_bytes: list[dict[str, int]]


def read_journal(folders: Sequence[Path]) -> Journal | None:
    """The journal in all of `folders`, None if there is none in any.

    Raises `DataError` for one that cannot be read, and where the folders hold parts of different runs.
    """
    journals = [_read(folder) for folder in folders]
    first = journals[0]
    for folder, journal in zip(folders[1:], journals[1:], strict=True):
        if (first and first.run) != (journal and journal.run):
            raise DataError(
                f"{folders[0]} and {folder} do not hold parts of one interrupted run; one that wrote only some of the "
                f"datasets goes on with its own command, and removing {' and '.join(map(str, folders))} starts from "
                "nothing."
            )
    # A run may have been killed between two folders. Then one journal is older and counts less, which is as true.
    return first


def write_journal(folders: Sequence[Path], journal: Journal) -> None:
    """Makes `journal` durable in all of `folders`. What it says counts has to be durable before."""
    content = json.dumps({"version": JOURNAL_VERSION, **asdict(journal)})
    for folder in folders:
        temporary = folder / "journal.tmp"
        temporary.write_text(content)
        sync_file(temporary)
        os.replace(temporary, folder / JOURNAL)
        sync_folder(folder)


def forget_journal(folders: Sequence[Path]) -> None:
    """What was written before does not count any more."""
    for folder in folders:
        (folder / JOURNAL).unlink(missing_ok=True)


def has_journal(folders: Sequence[Path]) -> bool:
    """Whether there is something to go on with."""
    return all((folder / JOURNAL).exists() for folder in folders)


def _read(folder: Path) -> Journal | None:
    file = folder / JOURNAL
    try:
        content = json.loads(file.read_text())
        if (version := content.pop("version")) != JOURNAL_VERSION:
            raise ValueError(f"version {version}")
        return Journal(**content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); remove {folder} to start from nothing.") from error
