"""Compares two runs in the iterations that both have logged, and fails where their losses differ.

    python examples/compare_losses.py first/metrics.jsonl second/metrics.jsonl

A run that continues a checkpoint on another layout does the arithmetic of the same step in another order, so in fp32
the last digits may differ.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.training.sinks import read_metrics


def main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    first, second = logged_losses(options.first), logged_losses(options.second)
    shared = sorted(first.keys() & second.keys())
    if not shared:
        sys.exit(f"{options.first} and {options.second} have no iteration in common")
    print(f"{'iteration':>9}  {'loss':10}  {options.first.parent}  {options.second.parent}  relative difference")
    differences = []
    for iteration, name in shared:
        one, other = first[iteration, name], second[iteration, name]
        differences.append(abs(one - other) / abs(one))
        columns = f"{one:{len(str(options.first.parent))}.7f}  {other:{len(str(options.second.parent))}.7f}"
        print(f"{iteration:9d}  {name:10}  {columns}  {differences[-1]:19.1e}")
    if not all(difference <= options.tolerance for difference in differences):  # a NaN is not
        sys.exit(f"the losses differ by up to {max(differences):.1e}, and --tolerance is {options.tolerance:.1e}")


def logged_losses(path: Path) -> dict[tuple[int, str], float]:
    """(iteration, "training" or "validation") -> the loss that was logged; what was not finite is NaN."""
    losses = {}
    for line in read_metrics(path):
        iteration = line["iteration"]
        assert isinstance(iteration, int)
        for key, name in (("lm_loss", "training"), ("validation_loss", "validation")):
            if key in line:
                value = line[key]
                losses[iteration, name] = math.nan if value is None else float(value)
    return losses


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, metavar="FILE", help="metrics.jsonl of a run")
    parser.add_argument("second", type=Path, metavar="FILE", help="metrics.jsonl of another run")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, metavar="X", help="largest relative difference; default: %(default)s"
    )
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
