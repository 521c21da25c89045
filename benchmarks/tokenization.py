"""Text to tokens: tools/preprocess_data.py against the tokenizer library's own threads, in turn, on the same text.

    python -m benchmarks.tokenization --input corpus.jsonl --tokenizer_model tokenizer.json

Ours is the whole command, from JSON lines to .bin and .idx, in a process of its own; its rate is measured behind its
start-up, which is shown beside it. The peer is the library alone: texts in memory in, ids in memory out. Both have
the same number of threads. Every run starts cold, and no text is repeated in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.pairs import interval_of_median
from benchmarks.worker import hardware_name
from megatron.data.documents import read_texts
from megatron.tokenizer import TokenizerConfig, build_tokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

REPOSITORY: Final = Path(__file__).parent.parent
RESULT: Final = Path(__file__).parent / "results" / "tokenization.md"
# What the project asks of itself: MB/s of byte-level BPE with gigatoken, the share of the library's rate without, and
# seconds to start.
FAST_BAR_MB_S: Final = 60.0
REFERENCE_BAR: Final = 0.9
START_UP_BAR_S: Final = 1.0


@dataclass(frozen=True)
class Run:
    """One run over a file of `num_bytes`: seconds and CPU seconds, and the seconds of start-up."""

    num_bytes: int
    seconds: float
    cpu_s: float
    start_up_s: float = 0.0

    @property
    def mb_per_s(self) -> float:
        return self.num_bytes / 1e6 / self.seconds

    @property
    def cpu_ms_per_mb(self) -> float:
        return 1e3 * self.cpu_s / (self.num_bytes / 1e6)


def main(argv: list[str]) -> None:
    options = _parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        texts = list(read_texts([Path(options.input)], "text"))
        sample = _first(texts, int(options.reference_mb * 1e6))
        part = Path(folder, "part.jsonl")
        part.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample))
        fast, ours, peer = [], [], []
        for pair in range(options.pairs):
            fast.append(_run_tool(options, Path(options.input), folder, "gigatoken"))
            sides = [lambda: ours.append(_run_tool(options, part, folder, "reference"))]
            sides.append(lambda: peer.append(_run_library(options, part)))
            for side in sides if pair % 2 else reversed(sides):
                side()
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=options.tokenizer_model))
    fast_bar = None if isinstance(tokenizer, SentencePieceTokenizer) else FAST_BAR_MB_S
    heading, verdicts = _heading(options, tokenizer.name), _verdicts(fast, ours, peer, fast_bar)
    table = "\n".join([*heading, *_rows(fast, ours, peer), "", *verdicts, ""])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(table)
    print(table)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenization", description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="JSON lines with the key text")
    parser.add_argument("--tokenizer_model", required=True, help="a file or folder, as of tools/preprocess_data.py")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads of both sides")
    parser.add_argument("--pairs", type=int, default=10, help="runs of each side (default: %(default)s)")
    parser.add_argument(
        "--reference_mb", type=float, default=10.0, help="text for the slow sides, in MB (default: %(default)s)"
    )
    return parser.parse_args(argv)


def _first(texts: list[str], num_bytes: int) -> list[str]:
    taken: list[str] = []
    for text in texts:
        if num_bytes <= 0:
            break
        taken.append(text)
        num_bytes -= len(text.encode())
    return taken


def _run_tool(options: argparse.Namespace, file: Path, folder: str, backend: str) -> Run:
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(file), "--output_prefix", f"{folder}/out"]
    command += ["--tokenizer_model", options.tokenizer_model, "--workers", str(options.workers)]
    command += ["--tokenizer_backend", backend, "--log_interval", "1000000000"]
    start, start_cpu = time.perf_counter(), _children_cpu_s()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    wall_s, cpu_s = time.perf_counter() - start, _children_cpu_s() - start_cpu
    if done.returncode:
        raise SystemExit(done.stderr)
    ((text_mb, rate),) = re.findall(r"([\d.]+) MB at ([\d.]+) MB/s", done.stdout)
    seconds = float(text_mb) / float(rate)
    return Run(file.stat().st_size, seconds, cpu_s, wall_s - seconds)


def _run_library(options: argparse.Namespace, file: Path) -> Run:
    command = [sys.executable, "-m", "benchmarks.tokenizer_library", str(file), options.tokenizer_model]
    done = subprocess.run([*command, str(options.workers)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    seconds, cpu_s = map(float, done.stdout.split())
    return Run(file.stat().st_size, seconds, cpu_s)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _heading(options: argparse.Namespace, tokenizer_name: str) -> list[str]:
    return [
        "# Text to tokens",
        "",
        f"{hardware_name()}, {options.workers} threads, {options.pairs} runs of each side; {tokenizer_name}",
        "",
    ]


def _rows(fast: list[Run], ours: list[Run], peer: list[Run]) -> list[str]:
    sides = {"ours with gigatoken": fast, "ours without": ours, "the library alone": peer}
    return [
        "| side | text in MB | MB/s | CPU ms/MB, start-up included | start-up in s |",
        "|---|---|---|---|---|",
        *(_row(name, runs) for name, runs in sides.items()),
    ]


def _row(name: str, runs: list[Run]) -> str:
    rate = statistics.median(run.mb_per_s for run in runs)
    cpu = statistics.median(run.cpu_ms_per_mb for run in runs)
    start_up = statistics.median(run.start_up_s for run in runs)
    return f"| {name} | {runs[0].num_bytes / 1e6:.1f} | {rate:.2f} | {cpu:.1f} | {start_up:.2f} |"


def _verdicts(fast: list[Run], ours: list[Run], peer: list[Run], fast_bar: float | None) -> list[str]:
    ratios = sorted(mine.mb_per_s / theirs.mb_per_s for mine, theirs in zip(ours, peer, strict=True))
    low, high = interval_of_median(len(ratios))
    ratio = statistics.median(ratios)
    rate, start_up = statistics.median(run.mb_per_s for run in fast), statistics.median(run.start_up_s for run in fast)
    return [
        f"- rate with gigatoken {rate:.1f} MB/s, {_against(fast_bar, rate)}",
        f"- rate without / the library's {ratio:.3f} [{ratios[low]:.3f}, {ratios[high]:.3f}], bar {REFERENCE_BAR}: "
        f"{_verdict(ratio >= REFERENCE_BAR)}",
        f"- start-up {start_up:.2f} s, bar {START_UP_BAR_S:.0f}: {_verdict(start_up < START_UP_BAR_S)}",
    ]


def _against(bar: float | None, rate: float) -> str:
    return "no bar" if bar is None else f"bar {bar:.0f}: {_verdict(rate >= bar)}"


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "**short**"


if __name__ == "__main__":
    main(sys.argv[1:])
