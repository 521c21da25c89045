"""The resident memory of a process at its highest."""

from __future__ import annotations

import re
from pathlib import Path


def peak_resident_kib() -> int:
    """Linux's VmHWM, in KiB. `getrusage` would begin with the peak of the process that started this one."""
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])
