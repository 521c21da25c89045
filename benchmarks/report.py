"""The results as a table: one JSON file per row, and the Markdown made from all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from benchmarks.pairs import Ratio
from benchmarks.worker import Result

RESULTS: Final = Path(__file__).parent / "results"

HEADER = """# Benchmark results

Written by `make bench`. Each row: pairs of steps of ours and the peer, in turn, in the same processes; the median of
their speed ratios (above 1: ours is faster) and its 95% interval, and the ratio of CPU times. A ratio below its bar is
**short**, and the profile of both sides follows. The losses of both sides agree to 1e-4 in every step, or there is no
row.

| comparison | size | ours | peer | ratio | 95% interval | CPU time | bar | | pairs | load | s/step | tok/s | GFLOP/s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def result_path(name: str, size: str) -> Path:
    return RESULTS / f"{size}-{name}.json"


def read_result(path: Path) -> Result:
    values: dict[str, Any] = json.loads(path.read_text())
    for name in ("ratio", "cpu_ratio"):
        values[name] = Ratio(**values[name])
    if values["profiles"] is not None:
        values["profiles"] = tuple(values["profiles"])
    return Result(**values)


def write_table(order: list[tuple[str, str]]) -> None:
    """Rows in the given order of (name, size), of all results there are."""
    results = [read_result(path) for name, size in order if (path := result_path(name, size)).exists()]
    text = HEADER + "".join(_row(result) for result in results) + "\n" + _machines(results)
    text += "".join(_profile(result) for result in results)
    (RESULTS / "README.md").write_text(text)


def one_line(result: Result) -> str:
    """For the terminal."""
    ratio = result.ratio
    return (
        f"{result.name:8s} {result.size:2s}  {ratio.median:5.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  "
        f"CPU time {result.cpu_ratio.median:5.3f}  "
        f"bar {result.bar:4.2f}  {_verdict(result):5s}  {result.ours_step_s:6.3f} s/step  "
        f"{result.ours} / {result.peer}"
    )


def _row(result: Result) -> str:
    ratio = result.ratio
    verdict = f"**{_verdict(result)}**" if result.is_short else _verdict(result)
    cells = (
        result.name,
        result.size,
        result.ours,
        result.peer,
        f"{ratio.median:.3f}",
        f"{ratio.low:.3f} to {ratio.high:.3f}",
        f"{result.cpu_ratio.median:.3f}",
        f"{result.bar:g}",
        verdict,
        f"{result.num_pairs}",
        f"{result.load_before:.1f}",
        f"{result.ours_step_s:.3f}",
        f"{result.ours_tokens_per_s:.0f}",
        f"{result.ours_gflops:.0f}",
    )
    return "| " + " | ".join(cells) + " |\n"


def _verdict(result: Result) -> str:
    return "short" if result.is_short else "met"


def _machines(results: list[Result]) -> str:
    lines = {f"- {result.hardware}, torch {result.torch_version}, {result.date[:10]}" for result in results}
    return "\n".join(sorted(lines)) + "\n"


def _profile(result: Result) -> str:
    if result.profiles is None:
        return ""
    ours, peer = result.profiles
    title = f"\n## {result.name} {result.size}: {result.ratio.median:.3f}, short of {result.bar:g}\n"
    return f"{title}\nOurs:\n\n```\n{ours}\n```\n\nPeer:\n\n```\n{peer}\n```\n"
