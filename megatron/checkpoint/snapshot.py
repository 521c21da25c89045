"""The state of a moment, copied to host memory, to be written while training goes on."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.agreement import gather_to_all, on_every_rank
from megatron.checkpoint.source import LocalTensor
from megatron.core.topology import Axis
from megatron.errors import CheckpointError

_GIB = 2**30
_MEMORY_FILE = Path("/proc/meminfo")
# The limit and the use of the container that the process runs in, where it runs in one.
_CONTAINER_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


class HostBuffers:
    """Host memory for what one rank saves, taken once and used for every save: pinned where the state is on a GPU.

    `tensors` are what will be copied, in this order and with these shapes.
    """

    def __init__(self, tensors: Sequence[LocalTensor]):
        self._buffers = [_like(local.tensor) if _is_written(local) else None for local in tensors]

    def copy(self, tensors: Sequence[LocalTensor]) -> list[LocalTensor]:
        """The tensors as they are now. They are overwritten by the next call, so the save before it must be done."""
        copies = []
        for local, buffer in zip(tensors, self._buffers, strict=True):
            if buffer is not None:
                buffer.copy_(local.tensor, non_blocking=True)
                local = dataclasses.replace(local, tensor=buffer)
            copies.append(local)
        if any(local.tensor.is_cuda for local in tensors):
            torch.cuda.current_stream().synchronize()
        return copies


def snapshot_bytes(tensors: Sequence[LocalTensor]) -> int:
    """What a copy of them takes."""
    return sum(local.tensor.nbytes for local in tensors if _is_written(local))


def check_host_memory(tensors: Sequence[LocalTensor], world: Axis) -> None:
    """Raises CheckpointError on all ranks if a host cannot hold the copies of its processes, as far as it says."""
    host = socket.gethostname()
    needs = [need for other, need in gather_to_all(world, (host, snapshot_bytes(tensors))) if other == host]
    on_every_rank(world, lambda: _check(sum(needs), len(needs), available_host_bytes()))


def available_host_bytes() -> int | None:
    """What processes of this host, or of this container, may still allocate; None where the system does not say."""
    found = []
    if _MEMORY_FILE.exists():
        lines = (line.split() for line in _MEMORY_FILE.read_text().splitlines())
        found += [int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    if all(file.exists() for file in _CONTAINER_FILES):
        limit, use = (file.read_text().strip() for file in _CONTAINER_FILES)
        found += [int(limit) - int(use)] if limit.isdigit() else []
    return min(found, default=None)


def _check(need: int, num_processes: int, available: int | None) -> None:
    if available is not None and need > available:
        raise CheckpointError(
            f"--async_save needs {need / _GIB:.3f} GiB of host memory for the copies of {num_processes} processes, and "
            f"{available / _GIB:.3f} GiB are available; drop --async_save, or use fewer processes on a host."
        )


def _is_written(local: LocalTensor) -> bool:
    return any(region.copy == 0 for region in local.regions)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
