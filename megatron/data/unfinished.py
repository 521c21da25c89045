"""Datasets while they are written: nothing of them has a name that a reader knows, and a killed run can go on.

`<prefix>.unfinished/` holds what was written so far, and the journal, which says up to where it counts. Where a
journal says that n bytes of a file count, these bytes were on disk before it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron.data.encoding import EncodedTexts
from megatron.data.index_file import CHUNK_SEQUENCES, write_index
from megatron.durable import sync_folder
from megatron.errors import DataError

JOURNAL_VERSION = 1
JOURNAL_INTERVAL_S = 15.0

TOKENS, LENGTHS, BOUNDARIES = "tokens", "lengths", "boundaries"
IDX = "idx"  # once all is written
FILES = (TOKENS, LENGTHS, BOUNDARIES)

# What flock says on file systems without locks (some NFS and Lustre mounts).
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Journal:
    """Up to where an earlier run came: its request, its own notes, and the bytes of each file that count."""

    request: dict[str, Any]
    notes: dict[str, Any]
    num_bytes: tuple[dict[str, int], ...]


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
    def folder(self) -> Path:
        """Where the journal is."""
        return self.folder_of(self._prefixes[0])

    def read_journal(self) -> Journal | None:
        """The journal of an earlier run, None if there is none. Raises `DataError` for one that cannot be read."""
        file = self.folder / "journal.json"
        try:
            content = json.loads(file.read_text())
            if content["version"] != JOURNAL_VERSION:
                raise ValueError(f"version {content['version']}")
            return Journal(content["request"], content["notes"], tuple(content["num_bytes"]))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: cannot be read ({error}); remove {self.folder} to start from nothing.") from error

    def open(self, journal: Journal | None) -> None:
        """Starts from nothing, or from what `journal` says."""
        try:
            if journal is None:
                self._forget()
            sizes = [dict.fromkeys(FILES, 0)] * len(self._prefixes) if journal is None else journal.num_bytes
            for prefix, size in zip(self._prefixes, sizes, strict=True):
                self.folder_of(prefix).mkdir(parents=True, exist_ok=True)
                if journal is None:
                    (self.folder_of(prefix) / IDX).unlink(missing_ok=True)  # of an earlier run: not of these tokens
                self._files.append({name: _open_at(self.folder_of(prefix) / name, size[name]) for name in FILES})
                self._num_sequences.append(size[LENGTHS] // 4)
        except OSError as error:
            raise self._cannot_write(error) from error

    def restart(self) -> None:
        """Throws away what was written, also by earlier runs."""
        self._wait()
        self._forget()
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
            for prefix, dtype, files in zip(self._prefixes, self._dtypes, self._files, strict=True):
                folder = self.folder_of(prefix)
                for file in files.values():
                    file.flush()
                _flush_and_sync([files[TOKENS]])  # of the others only what the index repeats is kept
                with open(folder / IDX, "wb", buffering=1 << 20) as idx:
                    _write_index(idx, folder, dtype)
                    _flush_and_sync([idx])
            self._forget()  # files move one by one from here on: there is nothing to go on with
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
        if (self.folder / "journal.json").exists():
            if self._files:
                logger.warning("%s keeps what is done; the same command with --resume goes on from there.", self.folder)
        elif self._files and not self._is_naming:
            for prefix in self._prefixes:
                shutil.rmtree(self.folder_of(prefix), ignore_errors=True)
        self._locks.close()

    def _forget(self) -> None:
        """What was written before does not count any more."""
        (self.folder / "journal.json").unlink(missing_ok=True)

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
                if not _try_lock(lock):
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
        content = {"version": JOURNAL_VERSION, "request": self._request, "notes": notes, "num_bytes": num_bytes}
        self._syncing = self._background.submit(self._sync_journal, json.dumps(content))

    def _sync_journal(self, content: str) -> None:
        for files in self._files:
            for file in files.values():
                os.fsync(file.fileno())
        temporary = self.folder / "journal.tmp"
        with open(temporary, "wb") as journal:
            journal.write(content.encode())
            _flush_and_sync([journal])
        os.replace(temporary, self.folder / "journal.json")
        sync_folder(self.folder)

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


def _try_lock(lock: IO[bytes]) -> bool:
    """False if another process holds it. A file system without locks is taken at its word."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _remove_empty(folder: Path) -> None:
    """Removes a folder that holds a lock and nothing to lock."""
    with contextlib.suppress(OSError):
        if os.listdir(folder) == ["lock"]:
            shutil.rmtree(folder)


def _open_at(path: Path, num_bytes: int) -> IO[bytes]:
    """Opens `path` behind its first `num_bytes`, and cuts what follows."""
    file = open(path, "r+b" if num_bytes else "wb", buffering=1 << 20)  # noqa: SIM115 - closed by its owner
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
