"""A folder of numpy arrays that are computed once and found again by everything they depend on.

One entry is one folder ``<name>-<hash of the key>/`` with ``<array>.npy`` files and ``manifest.json``: the
key in clear, and the size and checksum of each file. An entry is written under another name and renamed, so
it appears whole or not at all; whatever does not match its manifest is built again. One process builds while
the others on the same cache wait.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.data.file_lock import exclusive
from megatron.errors import DataError

logger = logging.getLogger(__name__)

Key = Mapping[str, str | int | bool | None]
Arrays = dict[str, np.ndarray]
Append = Callable[[np.ndarray], object]

_MANIFEST = "manifest.json"
_LEFTOVER_AGE_S = 86400.0
_CHECKSUM_CHUNK_BYTES = 1 << 22


class EntryWriter:
    """The files of one entry in the making; arrays are written as they come, so that they need not be kept."""

    def __init__(self, folder: Path):
        self.files: dict[str, dict[str, int]] = {}
        self._folder = folder

    @contextlib.contextmanager
    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Iterator[Append]:
        """An array that is appended to, front to back, until it is whole."""
        form = np.empty(0, dtype).dtype
        path = self._folder / f"{name}.npy"
        with open(path, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(form), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            yield lambda values: file.write(np.ascontiguousarray(values, dtype=form).data)
            file.flush()
            assert file.tell() - start == math.prod(shape) * form.itemsize, f"{name} is not whole"
            os.fsync(file.fileno())
        self.files[name] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}

    def save(self, name: str, array: np.ndarray) -> None:
        with self.array(name, array.shape, array.dtype) as append:
            append(array)


def cached_arrays(folder: Path, name: str, key: Key, build: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of `build`, from the cache when an intact entry of this very key is there.

    The arrays are mapped read-only. Raises `DataError` when nothing is cached and `folder` cannot be written.
    """

    def write(writer: EntryWriter) -> None:
        for array_name, array in build().items():
            writer.save(array_name, array)

    return cached_entry(folder, name, key, write)


def cached_entry(folder: Path, name: str, key: Key, write: Callable[[EntryWriter], None]) -> Arrays:
    """As `cached_arrays`, for arrays too large to be in memory together: `write` hands over each when it is ready."""
    entry = folder / f"{name}-{_hash(key)}"
    arrays = _load(entry, key)
    if arrays is not None:  # also serves a read-only folder that somebody else has filled
        return arrays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(entry) as is_alone:
            arrays = _load(entry, key)  # another process may have built it while this one waited
            if arrays is None:
                logger.info("building %s", entry)
                if is_alone:
                    remove_leftovers(entry)
                _store(entry, key, write)
                arrays = _load(entry, key)
    except OSError as error:
        raise DataError(
            f"{folder}: the index cache cannot be written ({error.strerror}); give a writable folder with space "
            f"as --data_cache_path."
        ) from error
    if arrays is None:
        raise DataError(
            f"{entry}: damaged directly after it was written; check the disk, or give another folder as "
            f"--data_cache_path."
        )
    return arrays


def _hash(key: Key) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]


def remove_leftovers(target: Path) -> None:
    """Remove what processes that were killed while they made `target` have left in ``<target>.<any>.tmp<any>``.

    A lock may hold within a node only, so what somebody may be working on stays: all that changed within a day.
    """
    oldest = time.time() - _LEFTOVER_AGE_S
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.*.tmp*"):
        with contextlib.suppress(FileNotFoundError):  # its owner is done with it
            if max(path.stat().st_mtime for path in (leftover, *leftover.rglob("*"))) > oldest:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def _store(entry: Path, key: Key, write: Callable[[EntryWriter], None]) -> None:
    temporary = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    writer = EntryWriter(temporary)
    try:
        write(writer)
        _write_bytes(temporary / _MANIFEST, json.dumps({"key": dict(key), "files": writer.files}, indent=1).encode())
        _move_into_place(temporary, entry, key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_bytes(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(temporary: Path, entry: Path, key: Key) -> None:
    """Rename a finished entry; a damaged one in its place is moved away, an intact one is left."""
    if entry.exists() and _load(entry, key) is None:
        logger.warning("%s is damaged or not of this data; it is built again", entry)
        damaged = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.tmp")
        with contextlib.suppress(FileNotFoundError):  # where there are no locks, another process may be first
            os.rename(entry, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(temporary, entry)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _load(entry: Path, key: Key) -> Arrays | None:
    """Map the arrays of an intact entry; None for one that is missing, damaged, or of another key."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_bytes())
        if manifest["key"] != dict(key):
            return None
        return {name: _load_array(entry / f"{name}.npy", facts) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Any content can stand in a damaged file; all of it means the same: build again.
        return None


def _load_array(path: Path, facts: Mapping[str, int]) -> np.ndarray:
    if path.stat().st_size != facts["bytes"] or _checksum(path) != facts["crc32"]:
        raise ValueError(f"{path} does not match its manifest")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHECKSUM_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
