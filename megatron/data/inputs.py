"""Which files a command reads: patterns to files, in an order that every machine agrees on, and what each file is."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.errors import ConfigError, DataError

NOT_TEXT = (".zip", ".tar", ".tgz", ".7z", ".arrow", ".feather", ".bin", ".idx", ".npy", ".npz", ".pdf")

_SAMPLED_BLOCKS = 64
_SAMPLED_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class InputIdentity:
    """What tells that a file is still the one it was: name, size, and a hash of blocks all over it."""

    path: str
    num_bytes: int
    sampled_sha256: str


def find_inputs(patterns: Iterable[str]) -> list[Path]:
    """The files that `patterns` name: a file as it is, a glob (``*``, ``?``, ``[ab]``, ``**``) as its matches by name.

    Raises `ConfigError` for a glob without matches and for a file that is named twice.
    """
    named_by: dict[Path, str] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            if path in named_by:
                raise ConfigError(
                    f"--input names {path} twice, by {named_by[path]} and {pattern}; its text would count twice: "
                    "name it once."
                )
            named_by[path] = pattern
    return list(named_by)


def _matches(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [Path(pattern)]
    files = sorted(path for name in glob.iglob(pattern, recursive=True) if (path := Path(name)).is_file())
    if not files:
        raise ConfigError(f"--input {pattern} matches no file; check the folder and the pattern.")
    return files


def check_inputs(paths: Sequence[Path]) -> int:
    """The size of all files in bytes. Raises `DataError` for one that cannot be read as text."""
    total_bytes = 0
    for path in paths:
        if path.suffix in NOT_TEXT:
            raise DataError(
                f"{path} is not a text file by its name ({path.suffix}); give JSON lines, .txt or parquet "
                "(JSON lines and .txt also as .gz, .zst, .bz2 or .xz)."
            )
        if path.is_dir():
            raise DataError(f"{path} is a folder; name the files in it, for example '{path}/*.jsonl'.")
        try:
            # Before it is opened: that waits where nothing writes to a named pipe.
            if path.exists() and not path.is_file():
                raise DataError(
                    f"{path} is a pipe or a device, and inputs are read more than once; write the text into a file."
                )
            with path.open("rb"):
                total_bytes += path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; check --input.") from error
    return total_bytes


def identify_input(path: Path) -> InputIdentity:
    """The identity of a file as it is now; a copy under the same name has the same one."""
    num_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        last_start = max(num_bytes - _SAMPLED_BLOCK_BYTES, 0)
        for start in np.unique(np.linspace(0, last_start, _SAMPLED_BLOCKS).astype(np.int64)):
            file.seek(int(start))
            digest.update(file.read(_SAMPLED_BLOCK_BYTES))
    return InputIdentity(str(path), num_bytes, digest.hexdigest())
