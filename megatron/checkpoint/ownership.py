"""One process at a time saves into a folder.

Two runs in one folder would take each other's unfinished files for leftovers of a crash, and each other's checkpoints
for old ones of their own.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What file systems answer that do not offer locks (Lustre without -o flock, NFS without its lock service).
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def owned(root: Path) -> Iterator[None]:
    """Inside, no other process saves into `root`. Raises CheckpointError that names the process that does already.

    The kernel drops the lock when its process ends, however it ends, so a dead run is never in the way. It is a
    record lock (fcntl) and not one of flock, because child processes would inherit that one, and one that outlives
    a killed run would keep it. A file system without locks is a warning. A process must not enter twice for one folder:
    leaving once frees it.
    """
    with (root / LOCK_FILE).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise CheckpointError(
                f"{root} belongs to {_holder(root)}, which saves its checkpoints there; "
                "give each run a folder of its own to save to, or wait until that one has ended."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s is on a file system without locks (%s), so nothing keeps a second run from saving there; give each "
                "run a folder of its own",
                *(root, error.strerror),
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _holder(root: Path) -> str:
    return (root / LOCK_FILE).read_text().strip() or "another process"
