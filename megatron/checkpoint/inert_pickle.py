"""Pickles read as data: nothing that a pickle names is imported, and nothing of it is called.

What torch.distributed.checkpoint and torch.save write are pickles of plain records around numbers. Their classes and
functions become stand-ins that keep what the file says, so that a reader can see where tensors lie without them being
made. (`unpickle` has torch.load make them.)
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, Final

import torch

from megatron.checkpoint.unpickle import StandIn
from megatron.errors import CheckpointError, DamagedCheckpointError

# Immutable, and harmless when called.
_BUILT_IN: Final = (("torch.Size", tuple), ("collections.OrderedDict", dict))
_INERT_PACKAGES: Final = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "transformers.", "omegaconf.")
_INERT_NAMES: Final = frozenset(
    {
        "__builtin__.getattr",  # by which some versions of Python pickle a member of an enum
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.getattr",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.BFloat16Storage",
        "torch.BoolStorage",
        "torch.ByteStorage",
        "torch.CharStorage",
        "torch.DoubleStorage",
        "torch.FloatStorage",
        "torch.HalfStorage",
        "torch.IntStorage",
        "torch.LongStorage",
        "torch.ShortStorage",
    }
)


def read_inert(content: bytes, path: Path) -> Any:
    """The object in a pickle that comes from `path`, with a `StandIn` for each instance of a class.

    Raises CheckpointError naming what the pickle names, if that is neither a tensor nor a record of a checkpoint.
    """
    try:
        return _Unpickler(content, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # What damaged bytes lead to inside the unpickler has no common base.
        raise DamagedCheckpointError(
            f"{path} is damaged: it holds no whole pickle ({error}). Copy it again from where it was saved."
        ) from error


class _Unpickler(pickle._Unpickler):
    """Python's own implementation: the one in C allocates whatever memory a number in the file asks for."""

    def __init__(self, content: bytes, path: Path):
        super().__init__(io.BytesIO(content))
        self._path = path
        # Made anew for every file: a file could set attributes of its stand-ins.
        self._stand_ins: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        known = vars(torch).get(name) if module == "torch" else None
        if isinstance(known, torch.dtype):
            return known
        for built_in, value in _BUILT_IN:
            if qualified == built_in:
                return value
        if qualified in _INERT_NAMES or module.startswith(_INERT_PACKAGES):
            return self._stand_ins.setdefault(qualified, type("StandIn", (StandIn,), {"qualified_name": qualified}))
        raise CheckpointError(
            f"{self._path} names {qualified}, which is no part of a checkpoint: loading it could run a program. "
            "Nothing was executed; use a checkpoint from a source you trust."
        )

    def persistent_load(self, pid: Any) -> Any:
        """A storage is left as its description: where it lies is for the reader to see."""
        return pid
