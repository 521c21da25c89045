"""Indices, blends and random access: our times beside the bound that the machine sets.

python -m benchmarks.data_indices [--scale 1.0] [--rounds 5] [--documents 10000000]

Every figure is the best of `rounds` in one process, measured in turns with its bound or peer: the document order's
random gather for the sample index, `cp` of the same bytes for a merge. The memory is that of a process that builds the
indices of so many documents, of which it sees the lengths alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.memory import peak_resident_kib
from benchmarks.worker import hardware_name
from megatron.data import helpers
from megatron.data.blend import BlendedDataset, Member, Request
from megatron.data.gpt import DocumentBounds, GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.merge import merge

RESULT: Final = Path(__file__).parent / "results" / "data_indices.md"
SEQUENCE_LENGTH: Final = 2048
VOCABULARY: Final = 50000
_UNLIMITED: Final = 2**62


def best_of(rounds: int, *actions: Callable[[], object]) -> list[float]:
    """The shortest time of each action in seconds; they take turns."""
    times = [[_time(action) for action in actions] for _ in range(rounds)]
    return [min(column) for column in zip(*times, strict=True)]


def sample_index_rows(scale: float, rounds: int) -> list[str]:
    num_documents = int(10_000_000 * scale)
    random = np.random.default_rng(0)
    sizes = np.maximum(1, random.lognormal(6, 0.9, num_documents)).astype(np.int32)
    order = random.permutation(num_documents).astype(np.int32)
    out = np.empty_like(sizes)
    build, gather = best_of(
        rounds,
        lambda: helpers.build_sample_index(
            sizes, order, sequence_length=SEQUENCE_LENGTH, num_tokens=int(sizes.sum(dtype=np.int64))
        ),
        lambda: np.take(sizes, order, out=out),
    )
    return [
        f"| sample index, {num_documents:,} shuffled documents | {build:.3f} s "
        f"| random gather {gather:.3f} s | {build / gather:.2f}x |"
    ]


def blend_rows(scale: float, rounds: int) -> list[str]:
    num_samples, rows = int(10_000_000 * scale), []
    random = np.random.default_rng(1)
    for name, weights in (
        ("2 datasets", [0.7, 0.3]),
        ("10 datasets", random.random(10) + 0.01),
        ("100 equal datasets", np.ones(100)),
        ("100 datasets of random weights", random.random(100) + 0.01),
    ):
        limits = [_UNLIMITED] * len(weights)
        (seconds,) = best_of(rounds, partial(helpers.build_blend_index, list(weights), limits, num_samples))
        rows.append(f"| blend of {name}, {num_samples:,} samples | {seconds:.3f} s | | |")
    return rows


def reading_rows(folder: Path, rounds: int) -> list[str]:
    indexed = write(folder / "large", 50_000, seed=2)
    chosen = np.random.default_rng(3).permutation(8000)
    rows = []
    for name, bounds in (("without", DocumentBounds()), ("with", DocumentBounds(True, True))):
        dataset = GPTDataset(indexed, range(len(indexed)), 8000, SEQUENCE_LENGTH, 1, bounds=bounds)
        (seconds,) = best_of(rounds, partial(_read, dataset, chosen))
        rows.append(
            f"| random access {name} document bounds, s = {SEQUENCE_LENGTH} "
            f"| {len(chosen) / seconds:,.0f} samples/s | | |"
        )
    return rows


def start_rows(folder: Path, rounds: int) -> list[str]:
    prefixes = [folder / f"small{i}" for i in range(200)]
    for i, prefix in enumerate(prefixes):
        write(prefix, 100, seed=i)

    def start() -> None:
        members = [Member(prefix, partial(IndexedDataset, prefix)) for prefix in prefixes]
        request = Request(10_000, SEQUENCE_LENGTH, 1, range, "all", VOCABULARY, tuple(1.0 for _ in prefixes))
        BlendedDataset(members, request, DocumentBounds(), folder / "cache")

    first = _time(start)
    (cached,) = best_of(rounds, start)
    return [f"| start of a blend of 200 datasets, cached | {cached * 1e3:.1f} ms | first {first * 1e3:.0f} ms | |"]


def merge_rows(folder: Path, scale: float, rounds: int) -> list[str]:
    """Both sides have their files on the disk before they are done."""
    prefixes = [folder / f"part{i}" for i in range(3)]
    parts = [write(prefix, int(200_000 * scale), seed=i) for i, prefix in enumerate(prefixes)]
    files = [f"{prefix}{suffix}" for prefix in prefixes for suffix in (".bin", ".idx")]
    return [
        _merge_row("new files", parts, files, [folder / f"round{i}" for i in range(rounds)]),
        _merge_row("existing files", parts, files, [folder / "round0"] * rounds),
    ]


def _merge_row(name: str, parts: list[IndexedDataset], files: list[str], folders: list[Path]) -> str:
    ours_in, theirs_in = iter(folders), iter(folders)
    ours, theirs = best_of(
        len(folders),
        lambda: merge(parts, next(ours_in) / "merged", on_bytes=lambda num_bytes: None),
        lambda: _copy(files, next(theirs_in)),
    )
    size_mb = sum(Path(file).stat().st_size for file in files) / 1e6
    return (
        f"| merge of 3 datasets, {name}, {size_mb:,.0f} MB | {ours:.2f} s | cp {theirs:.2f} s | {theirs / ours:.2f} |"
    )


def memory_rows(folder: Path, num_documents: int) -> list[str]:
    """In a process of its own: the peak is a process's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        before, peak, seconds = pool.submit(_build_in_process, folder, num_documents).result()
    return [
        f"| indices of {num_documents:,} documents | {peak / 2**20:.2f} GiB at most "
        f"| {before / 2**20:.2f} GiB before | {seconds:.0f} s |"
    ]


class LengthsAlone:
    """A dataset of documents whose tokens nobody reads; their lengths are mapped, as those of an index are."""

    prefix, dtype = "lengths", np.dtype(np.uint16)

    def __init__(self, file: Path, num_documents: int):
        self.fingerprint = f"{num_documents} documents"
        random, out = np.random.default_rng(0), np.lib.format.open_memmap(file, "w+", np.int32, (num_documents,))
        for start in range(0, num_documents, 1 << 20):
            part = out[start : start + (1 << 20)]
            part[:] = np.maximum(1, random.lognormal(6, 0.9, len(part)))
        out.flush()
        self.sequence_lengths = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.sequence_lengths)


def _build_in_process(folder: Path, num_documents: int) -> tuple[int, int, float]:
    """The peaks of resident memory before and after, in KiB, and the time in seconds."""
    indexed = LengthsAlone(folder / "lengths.npy", num_documents)
    before, start = peak_resident_kib(), time.perf_counter()
    GPTDataset(indexed, range(num_documents), None, SEQUENCE_LENGTH, 1, cache_path=folder)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    return before, peak_resident_kib(), seconds


def write(prefix: Path, num_documents: int, *, seed: int) -> IndexedDataset:
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in np.maximum(1, random.lognormal(6, 0.9, num_documents)).astype(int):
            writer.add_document(random.integers(0, VOCABULARY, length).astype(np.uint16))
    return IndexedDataset(prefix)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_indices", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of documents and samples")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side, in turns")
    parser.add_argument("--documents", type=int, default=10_000_000, help="whose indices' memory is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *sample_index_rows(options.scale, options.rounds),
            *blend_rows(options.scale, options.rounds),
            *reading_rows(Path(folder), options.rounds),
            *start_rows(Path(folder), options.rounds),
            *merge_rows(Path(folder), options.scale, options.rounds),
            *memory_rows(Path(folder), options.documents),
        ]
    head = ["| what | time or rate | beside it | ratio |", "|---|---|---|---|"]
    table = "\n".join([f"# Data indices and reading\n\n{hardware_name()}\n", *head, *rows, ""])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(table)
    print(table)


def _copy(files: list[str], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    subprocess.run(["cp", *files, str(folder)], check=True)
    subprocess.run(["sync", *(str(folder / Path(file).name) for file in files)], check=True)


def _read(dataset: GPTDataset, chosen: np.ndarray) -> None:
    for index in chosen.tolist():
        dataset[index]


def _time(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
