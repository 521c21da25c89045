"""The peak of a process is its own, whatever the process that started it held."""

import subprocess
import sys
from pathlib import Path

from benchmarks.memory import peak_resident_kib

REPOSITORY = Path(__file__).parent.parent.parent
GROW = "from benchmarks.memory import peak_resident_kib as peak; a = peak(); b = bytearray(48 << 20); print(a, peak())"


def test_a_child_begins_with_its_own_peak_and_sees_what_it_takes():
    held = bytearray(256 << 20)
    held[::4096] = b"x" * len(held[::4096])
    done = subprocess.run([sys.executable, "-c", GROW], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 128 << 10 < peak_resident_kib()
    assert 40 << 10 <= after - before <= 56 << 10
