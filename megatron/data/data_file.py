"""One file of a dataset, on a disk or in an object store: how large it is, which version, and its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron.data.index_file import PREPROCESS_AGAIN, map_file
from megatron.data.object_store import ObjectStore, StoredFile, is_remote
from megatron.errors import DataError


class DataFile(Protocol):
    """`identity` changes whenever the content may have changed; it is no hash of it."""

    @property
    def name(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def head(self, num_bytes: int) -> bytes: ...

    def mapped(self) -> np.ndarray:
        """The whole content, uint8 [n]; of a stored file a local copy."""

    def tokens(self, dtype: np.dtype) -> np.ndarray | RemoteTokens:
        """[t], to be cut like an array; what is cut out is read-only."""


def find_file(name: str, store: ObjectStore) -> DataFile | None:
    """The file at a path or address; None where there is none."""
    if is_remote(name):
        stored = store.find(name)
        return None if stored is None else RemoteFile(stored, store)
    return LocalFile.find(name)


@dataclass(frozen=True)
class LocalFile:
    name: str
    num_bytes: int
    identity: str

    @classmethod
    def find(cls, name: str) -> LocalFile | None:
        path = Path(name)
        if not path.is_file():
            return None
        facts = path.stat()
        version = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}"
        return cls(name, facts.st_size, f"{path.absolute()} {version}")

    def head(self, num_bytes: int) -> bytes:
        with open(self.name, "rb") as file:
            return file.read(num_bytes)

    def mapped(self) -> np.ndarray:
        return map_file(Path(self.name))

    def tokens(self, dtype: np.dtype) -> np.ndarray:
        return self.mapped().view(dtype)


@dataclass(frozen=True)
class RemoteFile:
    stored: StoredFile
    store: ObjectStore

    @property
    def name(self) -> str:
        return self.stored.url

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes

    @property
    def identity(self) -> str:
        return self.stored.identity

    def head(self, num_bytes: int) -> bytes:
        wanted = min(num_bytes, self.num_bytes)
        return self.store.read_ranges(self.stored, [(0, wanted)])[0] if wanted else b""

    def mapped(self) -> np.ndarray:
        return map_file(self.store.local_copy(self.stored))

    def tokens(self, dtype: np.dtype) -> RemoteTokens:
        return RemoteTokens(self, dtype)


class RemoteTokens:
    """Tokens of a stored file, read when they are asked for; those of one request are fetched side by side."""

    def __init__(self, file: RemoteFile, dtype: np.dtype):
        self._file, self._dtype = file, dtype

    def __len__(self) -> int:
        return self._file.num_bytes // self._dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        return self.read([(start, stop)])[0]

    def read(self, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The tokens from start to before stop of each span."""
        outside = next(((start, stop) for start, stop in spans if not 0 <= start <= stop <= len(self)), None)
        if outside is not None:
            raise IndexError(f"tokens {outside[0]} to {outside[1]} of {self._file.name}, which has {len(self)}")
        size = self._dtype.itemsize
        in_bytes = [(start * size, stop * size) for start, stop in spans]
        parts = self._file.store.read_cached(self._file.stored, in_bytes)
        return [np.frombuffer(part, dtype=self._dtype) for part in parts]


def require_files(prefix: str, store: ObjectStore) -> tuple[DataFile, DataFile]:
    """The .idx and the .bin file of a dataset. Raises DataError where one or both are missing."""
    idx, bin_ = (find_file(f"{prefix}{suffix}", store) for suffix in (".idx", ".bin"))
    if idx is not None and bin_ is not None:
        return idx, bin_
    name = prefix.rsplit("/", 1)[-1]
    if idx is None and bin_ is None:
        raise DataError(
            f"{prefix}: there is no tokenized dataset of this name, neither {name}.bin nor {name}.idx; "
            f"give the path without .bin or .idx, or create the dataset with tools/preprocess_data.py."
        )
    missing, present = (".idx", ".bin") if idx is None else (".bin", ".idx")
    raise DataError(
        f"{prefix}{missing}: missing beside {name}{present}; a dataset is both files, perhaps the preprocessing was "
        f"interrupted: {PREPROCESS_AGAIN}."
    )
