"""Stands for a run in another process that saves into a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.checkpoint.ownership import LOCK_FILE

_OTHER_RUN = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(sys.argv[2])
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process_owns(root: Path, says: str = "process 4711 on node7") -> Iterator[subprocess.Popen]:
    """While inside, another process holds the lock of `root`, unless it is killed."""
    script = [sys.executable, "-c", _OTHER_RUN, str(root / LOCK_FILE), says]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"locked\n"
        try:
            yield process
        finally:
            process.kill()
