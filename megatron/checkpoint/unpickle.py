"""Files of torch.save, read without executing anything they bring.

torch.load(weights_only=True) builds tensors, containers and numbers, and refuses every other name. Files of training
programs hold some harmless names besides (the command line, enums, random states): those become inert stand-ins here,
objects that keep what the file says and do nothing. No class named in a file is ever imported.
"""

from __future__ import annotations

import argparse
import io
import pickletools
import threading
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import torch

from megatron.errors import CheckpointError, DamagedCheckpointError

# Classes of these packages say how a run was set up (enums, mostly); only the files' weights are of use.
_INERT_PACKAGES: Final = ("megatron", "apex", "amp_C", "transformer_engine", "fairseq", "omegaconf")
_INERT_NAMES: Final = (
    "_io.BytesIO",
    "datetime.timedelta",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "signal.Signals",
    "types.SimpleNamespace",
)
# Python 2's names of modules, which pickle protocol 2 still writes.
_RENAMED_MODULES: Mapping[str, str] = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_NUMPY_NUMBERS: Final = "biuf"

# A file of torch.save before its zip format: magic number, protocol, system, object, keys of the storages.
_LEGACY_PICKLES: Final = 5
_PICKLE_RECORD: Final = "data.pkl"


class StandIn:
    """An object of a class that was not imported: `args` it was made from, the `state` it was given."""

    qualified_name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> StandIn:
        instance = super().__new__(cls)
        instance.args, instance.state = args, None
        return instance

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{self.qualified_name}({', '.join(map(repr, self.args))})"


class StoredArray:
    """A numpy array as the file describes it; `array` makes one if it holds numbers."""

    def __setstate__(self, state: tuple[int, Sequence[int], StoredDtype, bool, bytes]) -> None:
        _, self._shape, self._dtype, self._is_fortran, self._data = state

    @property
    def array(self) -> np.ndarray:
        flat = np.frombuffer(self._data, self._dtype.numpy)
        return flat.reshape(tuple(self._shape), order="F" if self._is_fortran else "C")


class StoredDtype:
    """A numpy dtype as the file describes it: its code, "u4" say, and its byte order."""

    def __init__(self, code: str, *_: Any):
        self._code, self._byte_order = code, "="

    def __setstate__(self, state: Sequence[Any]) -> None:
        self._byte_order = state[1] if state[1] in ("<", ">") else "="

    @property
    def numpy(self) -> np.dtype:
        if not isinstance(self._code, str) or self._code[:1] not in _NUMPY_NUMBERS:
            raise ValueError(f"an array of {self._code!r}, which are no numbers")
        return np.dtype(self._byte_order + self._code)


def _stored_array(*_: Any) -> StoredArray:
    """In place of numpy's `_reconstruct`, which would allocate an array of any class and size."""
    return StoredArray()


def _stored_scalar(dtype: StoredDtype, data: bytes) -> int | float | bool:
    return np.frombuffer(data, dtype.numpy)[0].item()


def _member(owner: type[StandIn], name: str) -> StandIn:
    """In place of `getattr`, by which some versions of Python pickle a member of an enum."""
    if not (isinstance(owner, type) and issubclass(owner, StandIn)):
        raise ValueError(f"the attribute {name} of {owner!r}")
    return owner(name)


class _Allowing:
    """torch keeps the names it allows for the whole process: threads would take them from each other."""

    lock = threading.Lock()


def read_torch_file(path: Path, *, values: bool = True) -> Any:
    """What torch.save wrote to `path`, with tensors on the CPU.

    Tensors of a file in the zip format are mapped, not read: their bytes are fetched when they are used. Without
    `values` they are on the meta device, for `torch_places`. Raises CheckpointError naming the file and the name it
    brings if that is neither data nor known to be harmless, before anything is built; and naming the file if it is cut
    off or damaged.
    """
    try:
        names, can_map = _scan(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    allowed = _allowed_globals(names)
    with _Allowing.lock, torch.serialization.safe_globals([(value, name) for name, value in allowed.items()]):
        refused = sorted(names - allowed.keys() - _torch_names())
        if refused:
            raise CheckpointError(
                f"{path} names {', '.join(refused)}, which is no data: loading it could run a program. Nothing was "
                "executed; use a file of weights from a source you trust, safetensors at best."
            )
        return _load(path, can_map=can_map, device="cpu" if values else "meta")


def _torch_names() -> frozenset[str]:
    """The names that torch.load(weights_only=True) knows by itself."""
    return frozenset(torch._weights_only_unpickler._get_allowed_globals())


def _load(path: Path, *, can_map: bool, device: str) -> Any:
    try:
        return torch.load(str(path), map_location=device, weights_only=True, mmap=can_map and device == "cpu")
    except Exception as error:  # What damaged bytes lead to inside torch.load has no common base.
        raise _damaged(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    """torch's own, without its advice to load the file in a way that executes it."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip()
    if not text or text.startswith("Weights only load failed"):
        return type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _scan(path: Path) -> tuple[set[str], bool]:
    """All names in the pickles of a file, and whether its tensors can be mapped. Nothing is built."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _names_in([file] * _LEGACY_PICKLES), False
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                pickled = [read_record(archive, r) for r in records if r.filename.split("/")[-1] == _PICKLE_RECORD]
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise _damaged(path, str(error)) from error
        return _names_in(map(io.BytesIO, pickled)), all(r.compress_type == zipfile.ZIP_STORED for r in records)


def read_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bytes:
    """The bytes of a record, checked against its checksum unless torch.save was told to compute none."""
    if record.CRC == 0:
        del record.CRC
    return archive.read(record)


def _damaged(path: Path, reason: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is damaged or no file of torch.save ({reason}). Copy it again from where it was saved."
    )


def _names_in(pickles: Iterable[BinaryIO]) -> set[str]:
    """Every global in pickles, as "module.name", up to the first that is none: torch.load says what is wrong then."""
    names: set[str] = set()
    try:
        for pickled in pickles:
            strings: list[str] = []
            for opcode, argument, _ in pickletools.genops(pickled):
                if opcode.name in ("GLOBAL", "INST"):
                    module, name = str(argument).split(" ", 1)
                    names.add(f"{_RENAMED_MODULES.get(module, module)}.{name}")
                elif opcode.name == "STACK_GLOBAL":  # of protocol 4: the two strings that were pushed last
                    names.add(".".join(strings))
                elif isinstance(argument, str):
                    strings = [*strings[-1:], argument]
    except ValueError:
        return names
    return names


def _allowed_globals(names: set[str]) -> dict[str, Any]:
    """Name in the file -> what stands in its place, for all `names` known to be harmless."""
    allowed: dict[str, Any] = {
        "argparse.Namespace": argparse.Namespace,
        "builtins.getattr": _member,
        "numpy.dtype": StoredDtype,
        "numpy.ndarray": StoredArray,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed |= {f"{module}._reconstruct": _stored_array, f"{module}.scalar": _stored_scalar}
    inert = {name for name in names if name.split(".")[0] in _INERT_PACKAGES or name in _INERT_NAMES}
    stand_ins = {name: type("StandIn", (StandIn,), {"qualified_name": name}) for name in inert}
    return {name: value for name, value in {**allowed, **stand_ins}.items() if name in names}
