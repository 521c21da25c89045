"""One process makes a file while the others wait for it."""

import contextlib
import errno
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

# What flock says on file systems without locks (some NFS and Lustre mounts).
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})


def try_lock(file: IO[bytes]) -> bool | None:
    """Take the lock of an open file: False if another process holds it, None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[bool]:
    """Hold the lock of `target` (``<target>.lock`` beside it), waiting for it with one log line.

    The system releases the lock when its process ends, however it ends, so it cannot go stale. Yields False where
    the file system has no locks: several processes may then do the same work and must replace atomically.
    """
    with open(target.with_name(f"{target.name}.lock"), "ab") as file:
        taken = try_lock(file)
        if taken is False:
            logger.info("waiting for another process that builds %s", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield taken is not None
