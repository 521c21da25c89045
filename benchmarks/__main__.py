"""Runs the comparisons one after another, each in processes of its own, and writes benchmarks/results."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from benchmarks.comparisons import COMPARISONS, Comparison
from benchmarks.report import one_line, read_result, result_path, write_table
from benchmarks.reshard import measure_all as measure_resharding
from benchmarks.worker import hardware_name, threads_per_process
from benchmarks.workload import SIZES

MINIMUM_PAIRS: Final = 10
IDLE_LOAD: Final = 0.5
TIMEOUT_S: Final = 900


def main() -> None:
    arguments = _parse()
    print(f"{hardware_name()}; ratio of speeds (ours / peer), its 95% interval, at least {arguments.pairs} pairs")
    if os.getloadavg()[0] > IDLE_LOAD:
        print(f"The load is {os.getloadavg()[0]:.1f}: on a machine that is not idle the ratios are rough.")
    order = [(name, size) for size in arguments.size for name in arguments.only]
    failed = [f"{name} {size}" for name, size in order if not _run(name, size, arguments.pairs)]
    write_table([(name, size) for size in SIZES for name in COMPARISONS])
    if arguments.reshard:
        measure_resharding()
    if failed:
        raise SystemExit(f"no result for {', '.join(failed)}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="NAME")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["S", "M"])
    parser.add_argument("--pairs", type=int, default=MINIMUM_PAIRS, help="pairs of steps (default: %(default)s)")
    parser.add_argument("--reshard", action="store_true", help="also resharding of 2 GiB: see benchmarks.reshard")
    return parser.parse_args()


def _run(name: str, size: str, num_pairs: int) -> bool:
    """One comparison; its output is shown only if it fails."""
    comparison, path = COMPARISONS[name], result_path(name, size)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    load = str(os.getloadavg()[0])
    command = [*_launcher(comparison), "-m", "benchmarks.worker", name, size, str(num_pairs), load, str(path)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"{name} {size}: not finished after {TIMEOUT_S} s")
        return False
    if done.returncode or not path.exists():
        print(f"{name} {size} failed:\n{done.stdout}")
        return False
    print(one_line(read_result(path)), f"({time.monotonic() - start:.0f} s)", flush=True)
    return True


def _launcher(comparison: Comparison) -> list[str]:
    """Threads that spin while they wait take the core from whoever works, so they sleep."""
    variables = ["OMP_WAIT_POLICY=passive", f"OMP_NUM_THREADS={threads_per_process(comparison)}"]
    python = ["env", *variables, sys.executable]
    if comparison.num_processes == 1:
        return python
    return [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={comparison.num_processes}"]


if __name__ == "__main__":
    main()
