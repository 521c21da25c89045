"""Several files in one pass over a source: the same bytes for any number of workers, each byte read once by each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_samples import save_from_one_process
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.storage import PlannedPiece
from megatron.checkpoint.streaming import share_out, write_files
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Cut
from megatron.errors import CheckpointError


def thirds(source: NativeSource) -> dict[str, list[PlannedPiece]]:
    """Three files of every entry: matrices by columns in the first two halves of the rows and whole in the rest."""
    files: dict[str, list[PlannedPiece]] = {"a": [], "b": [], "c": []}
    for name in source.names():
        shape, dtype = source.shape(name), source.dtype(name)
        if len(shape) == 1:
            files["b"].append(PlannedPiece(name, shape, dtype, Rectangle.whole(shape), None))
            continue
        rows, columns = shape[0] // 2, shape[1] // 3
        for file, start, size in (
            ("a", (0, 0), (rows, columns)),
            ("b", (0, columns), (rows, shape[1] - columns)),
            ("c", (rows, 0), (shape[0] - rows, shape[1])),
        ):
            files[file].append(PlannedPiece(name, shape, dtype, Rectangle(start, size), Cut(1)))
    return files


@pytest.fixture
def source(tmp_path: Path) -> NativeSource:
    return NativeSource(save_from_one_process(tmp_path / "in", ParallelLayout(tp=2), tile_bytes=4096))


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    read: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    yield read


def test_the_files_are_the_same_for_any_number_of_workers(tmp_path: Path, source: NativeSource) -> None:
    files = thirds(source)
    contents, records = [], []
    for num_workers in (1, 2, 3, 7):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        reported: list[int] = []
        written = write_files(source, folder, files, num_workers=num_workers, on_bytes=reported.append)
        contents.append([(folder / name).read_bytes() for name in files])
        records.append(written)
        assert sum(reported) == sum(piece.num_bytes for pieces in files.values() for piece in pieces)
    assert all(content == contents[0] for content in contents)
    assert all(record == records[0] for record in records)


def test_one_worker_reads_every_byte_once_although_three_files_share_rows(
    tmp_path: Path, source: NativeSource, bytes_read: list[int]
) -> None:
    write_files(source, tmp_path, thirds(source), num_workers=1, on_bytes=lambda num_bytes: None)
    assert sum(bytes_read) == sum(record.num_bytes for record in source.manifest.files.values())


def test_two_workers_read_the_rows_that_they_share_twice_and_no_others(
    tmp_path: Path, source: NativeSource, bytes_read: list[int]
) -> None:
    """a and b (two thirds of the bytes) share rows; c has rows of its own, and b all vectors."""
    files = thirds(source)
    assert [list(share) for share in share_out(files, 2)] == [["a", "b"], ["c"]]
    write_files(source, tmp_path, files, num_workers=2, on_bytes=lambda num_bytes: None)
    stored = sum(record.num_bytes for record in source.manifest.files.values())
    headers = sum(record.header_bytes for record in source.manifest.files.values())
    # Where one's rows end and the other's begin lies inside tiles that both verify: once an entry and file at most.
    assert sum(bytes_read) <= stored + headers + 4096 * 2 * len(source.names())


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    num_workers=st.integers(1, 9),
)
def test_shares_are_consecutive_files_and_leave_none_out(sizes: list[int], num_workers: int) -> None:
    files = {
        str(number): [PlannedPiece("x", (size,), torch.uint8, Rectangle((0,), (size,)), None)]
        for number, size in enumerate(sizes)
    }
    shares = share_out(files, num_workers)
    assert [name for share in shares for name in share] == list(files)
    assert len(shares) <= num_workers and all(shares)
    heaviest = max(sum(piece.num_bytes for pieces in share.values() for piece in pieces) for share in shares)
    assert heaviest <= sum(sizes) / num_workers + max(sizes)


def test_the_failure_of_one_worker_stops_the_others_and_is_the_one_that_is_raised(
    tmp_path: Path, source: NativeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other waits inside a read until the failure has happened; it then ends before its next rows."""
    failed, reads = threading.Event(), []
    read: Callable = NativeSource.read

    def failing(self: NativeSource, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        if threading.current_thread().name.endswith("_0"):
            failed.set()
            raise CheckpointError("damaged")
        failed.wait(10)
        reads.append(name)
        return read(self, name, start, size)

    monkeypatch.setattr(NativeSource, "read", failing)
    with pytest.raises(CheckpointError, match="damaged"):
        write_files(source, tmp_path, thirds(source), num_workers=2, on_bytes=lambda num_bytes: None)
    assert len(reads) < len(source.names())
