"""Draws the training and validation losses of one or several runs.

    python examples/plot_loss.py first/metrics.jsonl second/metrics.jsonl --output loss.png

A run is named after the folder of its metrics.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron.training.sinks import Line, read_metrics


def main(argv: Sequence[str]) -> None:
    options = _parser().parse_args(argv)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, path in enumerate(options.metrics):
        draw_run(axes, path, color=f"C{number}")
    axes.set(xlabel="iteration", ylabel="loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.output, dpi=150)
    print(f"wrote {options.output}")


def draw_run(axes: Axes, path: Path, *, color: str) -> None:
    """A line for the training loss and points for the validation loss."""
    history, name = read_metrics(path), path.parent.name
    axes.plot(*curve(history, "lm_loss"), color=color, linewidth=1, label=name)
    evaluated = curve(history, "validation_loss")
    if evaluated.size:
        axes.plot(*evaluated, "o", color=color, markeredgecolor="black", label=f"{name}: validation")


def curve(history: Sequence[Line], key: str) -> np.ndarray:
    """[2, points]: iterations, and the values of `key`; what was not finite is NaN, which leaves a gap."""
    points = [(line["iteration"], line[key]) for line in history if key in line]
    return np.array(points, dtype=float).reshape(-1, 2).T


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="+", metavar="FILE", help="metrics.jsonl of a run")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write: .png, .svg, .pdf")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
