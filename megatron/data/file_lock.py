"""One process makes a file while the others wait for it."""

import contextlib
import errno
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# What flock says on file systems without locks (some NFS and Lustre mounts).
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[bool]:
    """Hold the lock of `target` (``<target>.lock`` beside it), waiting for it with one log line.

    The system releases the lock when its process ends, however it ends, so it cannot go stale. Yields False where
    the file system has no locks: several processes may then do the same work and must replace atomically.
    """
    with open(target.with_name(f"{target.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that builds %s", target)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            yield False
            return
        yield True
