"""What is on the disk for good: the content of a file, and the names in a folder."""

from __future__ import annotations

import os
from pathlib import Path


def sync_file(file: Path) -> None:
    """After this, what was written to `file` survives a power cut."""
    _sync(file)


def sync_folder(folder: Path) -> None:
    """After this, what was created, renamed or removed in `folder` stays so through a power cut."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
