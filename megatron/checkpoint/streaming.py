"""Writing several files in one pass over a source.

The pieces of all files are asked for in one order, that of the files, so that each file grows at its end only, and
rows that several files need (columns of one row, say) are read and verified once for all of them. With several
workers each has consecutive files and makes a pass of its own; what the files hold does not depend on their number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.plan import Rectangle, bounding_rectangle
from megatron.checkpoint.source import Source, row_chunks
from megatron.checkpoint.storage import FileWriter, PlannedPiece, WrittenFile

Files = Mapping[str, Sequence[PlannedPiece]]


def write_files(
    source: Source, folder: Path, files: Files, *, num_workers: int, on_bytes: Callable[[int], object]
) -> list[WrittenFile]:
    """Writes `files`, the pieces of each by its name, durably into `folder`; `on_bytes` hears of written bytes.

    Raises what reading and writing raise, after all workers have stopped.
    """
    lock, stop = threading.Lock(), threading.Event()

    def report(num_bytes: int) -> None:
        with lock:
            on_bytes(num_bytes)

    shares = share_out(files, num_workers)
    with ThreadPoolExecutor(len(shares), thread_name_prefix="writer") as executor:
        passes = [executor.submit(_write_together, source, folder, share, report, stop) for share in shares]
        try:
            wait(passes)
        finally:  # an interrupt comes to this thread alone
            stop.set()
    failures = [failure for one in passes if (failure := one.exception()) is not None]
    if failures:
        raise next((failure for failure in failures if not isinstance(failure, _Stopped)), failures[0])
    return [written for one in passes for written in one.result()]


def share_out(files: Files, num_workers: int) -> list[Files]:
    """At most `num_workers` non-empty shares of consecutive files, about equal in bytes."""
    num_bytes = {name: sum(piece.num_bytes for piece in pieces) for name, pieces in files.items()}
    total, before = max(1, sum(num_bytes.values())), 0
    share_of: dict[str, int] = {}
    for name in files:
        share_of[name] = (2 * before + num_bytes[name]) * num_workers // (2 * total)
        before += num_bytes[name]
    grouped = groupby(files, key=lambda name: min(share_of[name], num_workers - 1))
    return [{name: files[name] for name in names} for _, names in grouped]


class _Stopped(Exception):
    """Another worker has failed."""


def _write_together(
    source: Source, folder: Path, files: Files, report: Callable[[int], None], stop: threading.Event
) -> list[WrittenFile]:
    with ExitStack() as stack:
        stack.push(lambda kind, *_: stop.set() if kind else None)
        writers = {name: stack.enter_context(FileWriter(folder / name, pieces)) for name, pieces in files.items()}
        for pieces in _in_passes(files):
            for rectangle, rows in _rows_of(source, list(pieces.values())):
                for name, piece in pieces.items():
                    if stop.is_set():
                        raise _Stopped
                    if (part := piece.rectangle.intersection(rectangle)) is not None:
                        writers[name].append(rows[part.slices_in(rectangle)].to(piece.dtype))
                        report(part.num_elements * piece.dtype.itemsize)
                del rows  # before the next ones are read
        return [writer.finish() for writer in writers.values()]


def _in_passes(files: Files) -> Iterator[dict[str, PlannedPiece]]:
    """One entry after another: the piece of it that each file holds."""
    ordered = sorted(((piece.order, name, piece) for name, pieces in files.items() for piece in pieces))
    for _, held in groupby(ordered, key=lambda item: item[2].entry):
        pieces = [(name, piece) for _, name, piece in held]
        assert len(dict(pieces)) == len(pieces), "a rank holds one rectangle of an entry"
        yield dict(pieces)


def _rows_of(source: Source, pieces: Sequence[PlannedPiece]) -> Iterator[tuple[Rectangle, Tensor]]:
    """The rows that `pieces` of one entry need, some at a time, with the rectangle they are."""
    wanted = bounding_rectangle([piece.rectangle for piece in pieces])
    first = wanted.start[0] if wanted.start else 0
    for rows in row_chunks(source, pieces[0].entry, wanted.start, wanted.size):
        if not wanted.size:
            yield wanted, rows
            return
        yield Rectangle((first, *wanted.start[1:]), (len(rows), *wanted.size[1:])), rows
        first += len(rows)
