"""Datasets while they are written: nothing of them has a name that a reader knows, and a killed run can go on.

`<prefix>.unfinished/` holds what was written so far, and the journal, which says up to where it counts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron.data.encoding import EncodedTexts
from megatron.data.file_lock import try_lock
from megatron.data.index_file import CHUNK_SEQUENCES, write_index
from megatron.data.journal import Journal, forget_journal, has_journal, read_journal, write_journal
from megatron.durable import sync_folder
from megatron.errors import DataError

JOURNAL_INTERVAL_S = 15.0

TOKENS, LENGTHS, BOUNDARIES = "tokens", "lengths", "boundaries"
IDX = "idx"  # once all is written
FILES = (TOKENS, LENGTHS, BOUNDARIES)

logger = logging.getLogger(__name__)


class UnfinishedDatasets:
    """Appends documents to the datasets at `prefixes`, of `dtypes`, all of which get the same documents.

    All is done within a ``with`` block, so that a journal that is read is not another process's: one that writes to
    any of the prefixes is a `DataError` on entering. `finish` gives the files their names, those of the first dataset
    last; leaving the block without it keeps what a journal says can be continued, and removes the rest.
    """

    def __init__(
        self,
        prefixes: Sequence[Path],
        dtypes: Sequence[np.dtype],
        request: dict[str, Any],
        *,
        journal_interval_s: float = JOURNAL_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._prefixes = tuple(prefixes)
        self._dtypes = tuple(dtypes)
        self._request = request
        self._run = uuid.uuid4().hex
        self._interval_s, self._clock = journal_interval_s, clock
        self._written_s = clock()
        self._num_sequences: list[int] = []
        self._files: list[dict[str, IO[bytes]]] = []
        self._locks = contextlib.ExitStack()
        self._is_naming = False
        self._syncing: Future[None] | None = None
        self._background = ThreadPoolExecutor(1)

    @staticmethod
    def folder_of(prefix: Path) -> Path:
        return Path(f"{prefix}.unfinished")

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the datasets are until they have their names."""
        return tuple(self.folder_of(prefix) for prefix in self._prefixes)

    def read_journal(self) -> Journal | None:
        """The journal of an earlier run of all the datasets, None if there is none.

        Raises `DataError` for one that cannot be read, and where an earlier run wrote only some of them.
        """
        return read_journal(self.folders)

    def open(self, journal: Journal | None) -> None:
        """Starts from nothing, or from what `journal` says."""
        try:
            if journal is None:
                forget_journal(self.folders)
                sizes = [dict.fromkeys(FILES, 0)] * len(self._prefixes)
            else:
                self._run, sizes = journal.run, journal.num_bytes
            for folder, size in zip(self.folders, sizes, strict=True):
                folder.mkdir(parents=True, exist_ok=True)
                if journal is None:
                    (folder / IDX).unlink(missing_ok=True)  # of an earlier run: not of these tokens
                self._files.append({name: _open_at(folder / name, size[name]) for name in FILES})
                self._num_sequences.append(size[LENGTHS] // 4)
        except OSError as error:
            raise self._cannot_write(error) from error

    def restart(self) -> None:
        """Throws away what was written, also by earlier runs."""
        self._wait()
        forget_journal(self.folders)
        for files in self._files:
            for file in files.values():
                file.seek(0)
                file.truncate()
        self._num_sequences = [0] * len(self._prefixes)

    def append(self, texts: Sequence[EncodedTexts], notes: Callable[[], dict[str, Any]]) -> None:
        """Adds documents; `notes` is called when the journal is due, and is what a later run is told."""
        try:
            for number, (text, files) in enumerate(zip(texts, self._files, strict=True)):
                boundaries = self._num_sequences[number] + np.cumsum(text.num_sequences, dtype="<i8")
                files[TOKENS].write(text.tokens.data)
                files[LENGTHS].write(text.lengths.astype("<i4", copy=False).data)
                files[BOUNDARIES].write(boundaries.data)
                self._num_sequences[number] += len(text.lengths)
            if self._clock() - self._written_s >= self._interval_s:
                self._write_journal(notes())
        except OSError as error:
            raise self._cannot_write(error) from error

    def finish(self) -> None:
        """Makes all files durable and only then gives them their names, the .idx file of each pair last."""
        try:
            self._wait()
            for folder, dtype, files in zip(self.folders, self._dtypes, self._files, strict=True):
                for file in files.values():
                    file.flush()
                _flush_and_sync([files[TOKENS]])  # of the others only what the index repeats is kept
                with open(folder / IDX, "wb", buffering=1 << 20) as idx:
                    _write_index(idx, folder, dtype)
                    _flush_and_sync([idx])
            forget_journal(self.folders)  # files move one by one from here on: there is nothing to go on with
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            self._give_names()
        except OSError as error:
            raise self._cannot_name(error) from error

    def __enter__(self) -> UnfinishedDatasets:
        try:
            self._lock()
        except OSError as error:
            raise self._cannot_write(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.shutdown()
        for files in self._files:
            for file in files.values():
                _close_quietly(file)
        if self._files and has_journal(self.folders):
            kept = " and ".join(map(str, self.folders))
            logger.warning("%s: what is done is kept; the same command with --resume goes on from there.", kept)
        elif self._files and not self._is_naming:
            for folder in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
        self._locks.close()

    def _give_names(self) -> None:
        """What cannot be moved is kept."""
        self._is_naming = True
        # An earlier .idx must never stand beside a new .bin, nor an earlier dataset beside a new one: not even between
        # two renames.
        for prefix in self._prefixes:
            Path(f"{prefix}.idx").unlink(missing_ok=True)
        for prefix in reversed(self._prefixes):
            for file, name in self._names(prefix):
                os.replace(file, name)
            sync_folder(prefix.parent)
        self._is_naming = False

    def _names(self, prefix: Path) -> tuple[tuple[Path, Path], ...]:
        """The finished files of a dataset and their names, in the order in which they get them."""
        folder = self.folder_of(prefix)
        return (folder / TOKENS, Path(f"{prefix}.bin")), (folder / IDX, Path(f"{prefix}.idx"))

    def _lock(self) -> None:
        """Takes the locks of all datasets, in an order on which all processes agree, or none of them."""
        with contextlib.ExitStack() as locks:
            for prefix in sorted(self._prefixes):
                folder = self.folder_of(prefix)
                folder.mkdir(parents=True, exist_ok=True)
                lock = locks.enter_context(open(folder / "lock", "ab"))
                if try_lock(lock) is False:
                    raise DataError(
                        f"{prefix}: another process is writing this dataset; wait for it, or choose another "
                        "--output_prefix."
                    )
                locks.callback(_remove_empty, folder)
            self._locks = locks.pop_all()

    def _write_journal(self, notes: dict[str, Any]) -> None:
        """In the background, unless the one before is still under way."""
        if self._syncing is not None and not self._syncing.done():
            return
        self._wait()
        self._written_s = self._clock()
        for files in self._files:
            for file in files.values():
                file.flush()
        num_bytes = [{name: file.tell() for name, file in files.items()} for files in self._files]
        journal = Journal(self._run, self._request, notes, num_bytes)
        self._syncing = self._background.submit(self._sync_journal, journal)

    def _sync_journal(self, journal: Journal) -> None:
        for files in self._files:
            for file in files.values():
                os.fsync(file.fileno())
        write_journal(self.folders, journal)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(
            f"{self._prefixes[0]}: cannot be written ({error.strerror}); what stood under this name is untouched. "
            f"Choose a folder that exists, is writable and has space."
        )

    def _cannot_name(self, error: OSError) -> DataError:
        names = [pair for prefix in reversed(self._prefixes) for pair in self._names(prefix)]
        left = [f"{file} to {name}" for file, name in names if file.exists()]
        move = f"move, in this order, {', '.join(left)}; or " if left else ""
        return DataError(
            f"{error.filename2 or error.filename or self._prefixes[0]}: a finished file cannot get this name "
            f"({error.strerror}), and a dataset that had it before may be gone. Nothing is lost of the new one: see to "
            f"the cause and {move}run again."
        )


def _remove_empty(folder: Path) -> None:
    """Removes a folder that holds a lock and nothing to lock."""
    with contextlib.suppress(OSError):
        if os.listdir(folder) == ["lock"]:
            shutil.rmtree(folder)


def _open_at(path: Path, num_bytes: int) -> IO[bytes]:
    """Opens `path` behind its first `num_bytes`, and cuts what follows."""
    file = open(path, "ab", buffering=1 << 20)  # noqa: SIM115 - closed by its owner
    present = os.fstat(file.fileno()).st_size
    if present < num_bytes:
        raise DataError(
            f"{path}: {present} bytes, but the journal beside it speaks of {num_bytes}; remove {path.parent} to start "
            "from nothing."
        )
    file.truncate(num_bytes)
    file.seek(num_bytes)
    return file


def _write_index(idx: IO[bytes], folder: Path, dtype: np.dtype) -> None:
    """The index in its final form, with memory for some of its sequences at a time."""
    num_sequences = (folder / LENGTHS).stat().st_size // 4
    num_documents = (folder / BOUNDARIES).stat().st_size // 8
    boundaries = chain([np.zeros(1, "<i8")], _chunks(folder / BOUNDARIES, "<i8"))
    write_index(idx, dtype, partial(_chunks, folder / LENGTHS, "<i4"), boundaries, num_sequences, num_documents + 1)


def _chunks(path: Path, dtype: str) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while chunk := file.read(np.dtype(dtype).itemsize * CHUNK_SEQUENCES):
            yield np.frombuffer(chunk, dtype)


def _flush_and_sync(files: Iterable[IO[bytes]]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _close_quietly(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
        file.close()
