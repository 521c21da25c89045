"""Names in a folder that is saved to: hidden ones for what is not complete, and how they are made durable."""

from __future__ import annotations

import os
from pathlib import Path

# What a save or a removal leaves under such a name is swept by the next save.
STAGING_PREFIX = ".tmp-"


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, as fsync makes the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
