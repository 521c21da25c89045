"""Files in an object store, such as ``s3://bucket/folder/corpus.bin``. The one place that imports fsspec.

Credentials and endpoints are those that the store's own client finds (for s3, what boto3 reads).
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from megatron.data.block_cache import BlockCache
from megatron.data.file_lock import exclusive
from megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# A wrong address should be told at once; an outage of a minute should not end a run.
_ATTEMPTS_TO_OPEN: Final = 3
_ATTEMPTS_TO_READ: Final = 8
_FIRST_WAIT_S: Final = 0.5
_DOWNLOAD_BYTES: Final = 1 << 23
_DOWNLOADS_AT_ONCE: Final = 8
# What the file systems of fsspec call that which changes with the content.
_VERSION_FACTS: Final = (
    "ETag", "etag", "VersionId", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created"
)  # fmt: skip


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


@dataclass(frozen=True)
class StoredFile:
    """`identity`: address, size and what the store says of the version, so that other content has another one."""

    url: str
    num_bytes: int
    identity: str


class ObjectStore:
    """Reads files of object stores, retrying what may pass: failed, cut and refused answers.

    Whole files are kept in `cache_path` (default: ``.cache/megatron`` in the home directory), parts of files in
    `blocks`, in memory, one bounded cache for all of them.
    """

    def __init__(
        self,
        cache_path: Path | None = None,
        *,
        blocks: BlockCache | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ):
        self.cache_path = cache_path if cache_path is not None else Path.home() / ".cache" / "megatron"
        self._blocks = blocks if blocks is not None else BlockCache()
        self._sleep = sleep

    def find(self, url: str) -> StoredFile | None:
        """The file at `url`, None where there is none. Raises ConfigError and DataError where nobody can say."""
        filesystem, path = _filesystem(url)
        problem: Exception | None = None
        for attempt in range(_ATTEMPTS_TO_OPEN):
            self._wait(attempt)
            try:
                facts = filesystem.info(path)
                break
            except FileNotFoundError:
                return None
            except PermissionError as error:
                raise _unreadable(url, error) from error
            except ImportError as error:
                raise _no_client(url, error) from error
            except Exception as error:  # every store has errors of its own
                problem = error
        else:
            assert problem is not None
            raise _unreadable(url, problem) from problem
        version = " ".join(f"{name}={facts[name]}" for name in _VERSION_FACTS if facts.get(name))
        return StoredFile(url, int(facts["size"]), f"{url} {facts['size']} {version}")

    def read_ranges(self, file: StoredFile, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes from start to before stop of each range, asked for side by side."""
        filesystem, path = _filesystem(file.url)
        found: dict[int, bytes] = {}
        problem = ""
        for attempt in range(_ATTEMPTS_TO_READ):
            missing = [i for i in range(len(ranges)) if i not in found]
            if not missing:
                break
            self._wait(attempt)
            starts, stops = ([ranges[i][side] for i in missing] for side in (0, 1))
            answers = filesystem.cat_ranges([path] * len(missing), starts, stops, on_error="return")
            for i, start, stop, answer in zip(missing, starts, stops, answers, strict=True):
                if isinstance(answer, bytes) and len(answer) == stop - start:
                    found[i] = answer
                else:
                    problem = _problem(answer, start, stop)
        if len(found) < len(ranges):
            raise DataError(
                f"{file.url}: cannot be read after {_ATTEMPTS_TO_READ} attempts ({problem}); check the connection to "
                "the store and that the file was not replaced, and start again from the last checkpoint.",
                this_rank_only=True,
            )
        return [found[i] for i in range(len(ranges))]

    def read_cached(self, file: StoredFile, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """As `read_ranges`, in whole blocks that are kept as long as there is room."""
        return self._blocks.read(file.identity, file.num_bytes, spans, lambda ranges: self.read_ranges(file, ranges))

    def local_copy(self, file: StoredFile) -> Path:
        """A copy of the whole file, made once for its identity; other processes wait meanwhile."""
        name = hashlib.sha256(file.identity.encode()).hexdigest()[:24]
        copy = self.cache_path / f"{name}-{file.url.rsplit('/', 1)[-1]}"
        if _is_whole(copy, file):
            return copy
        try:
            self.cache_path.mkdir(parents=True, exist_ok=True)
            with exclusive(copy):
                if not _is_whole(copy, file):
                    self._download(file, copy)
        except OSError as error:
            raise DataError(
                f"{self.cache_path}: {file.url} cannot be kept here ({error.strerror}); give a writable folder with "
                "space as --data_cache_path."
            ) from error
        return copy

    def _download(self, file: StoredFile, copy: Path) -> None:
        parts = [
            (start, min(start + _DOWNLOAD_BYTES, file.num_bytes)) for start in range(0, file.num_bytes, _DOWNLOAD_BYTES)
        ]
        temporary = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as output:
                for first in range(0, len(parts), _DOWNLOADS_AT_ONCE):
                    output.writelines(self.read_ranges(file, parts[first : first + _DOWNLOADS_AT_ONCE]))
                output.flush()
                os.fsync(output.fileno())
            os.replace(temporary, copy)
        finally:
            temporary.unlink(missing_ok=True)

    def _wait(self, attempt: int) -> None:
        """Doubles each time; the readers of a cluster spread out, so that they do not come back all at once."""
        if attempt:
            self._sleep(_FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        from fsspec.core import url_to_fs

        # What is there is asked anew each time: a dataset may be replaced while a program runs.
        filesystem, path = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise _no_client(url, error) from error
    except ValueError as error:
        raise ConfigError(f"{url}: is in no store that can be read ({error}); use s3://bucket/path, say.") from error
    return filesystem, path


def _no_client(url: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{url}: reading from a store needs a package that is not installed ({error}); pip install "
        "fsspec s3fs brings those for s3, or copy the dataset to a disk."
    )


def _unreadable(url: str, error: Exception) -> DataError:
    return DataError(
        f"{url}: cannot be read ({_described(error)}); check the address, the credentials and the endpoint "
        "(for s3, what `aws s3 ls` needs)."
    )


def _problem(answer: object, start: int, stop: int) -> str:
    if isinstance(answer, Exception):
        return _described(answer)
    return f"{len(answer) if isinstance(answer, bytes) else 0} bytes came of the {stop - start} from byte {start} on"


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _is_whole(copy: Path, file: StoredFile) -> bool:
    return copy.is_file() and copy.stat().st_size == file.num_bytes
