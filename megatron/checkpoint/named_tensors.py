"""Tensors as a foreign format names and stores them, before they get the names that this project gives them.

A format's reader is two halves: one knows how tensors lie in files (pieces of several shards, say), the other which
logical tensor each of them is. This file is what they agree on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron.errors import CheckpointError, listed


class NamedTensors(Protocol):
    """Named tensors of which rectangles can be read. Raises CheckpointError where the stored data is damaged."""

    @property
    def path(self) -> Path: ...

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The rectangle ``start, size`` as a new contiguous CPU tensor; reads little more than the bytes it needs."""


class Renamed:
    """Some of a store's tensors under other names: `stored_names` maps each new name to the stored one."""

    def __init__(self, stored: NamedTensors, stored_names: Mapping[str, str]):
        self.path = stored.path
        self._stored, self._stored_names = stored, stored_names

    def names(self) -> Sequence[str]:
        return list(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(self._stored_names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._stored_names[name])

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return self._stored.read(self._stored_names[name], start, size)


def check_holds(stored: NamedTensors, expected: Mapping[str, tuple[int, ...]], described_by: str) -> None:
    """Raises CheckpointError that lists what is missing, has another shape, has no place, or is no weight."""
    names = set(stored.names())
    problems = [f"{name} is missing" for name in expected if name not in names]
    problems += [
        f"{name} has shape {list(stored.shape(name))}, not {list(shape)}"
        for name, shape in expected.items()
        if name in names and stored.shape(name) != shape
    ]
    problems += [f"{name} has no place in the model" for name in stored.names() if name not in expected]
    problems += [
        f"{name} is {stored.dtype(name)}, not bf16, fp16 or fp32"
        for name in expected
        if name in names and stored.dtype(name) not in (torch.bfloat16, torch.float16, torch.float32)
    ]
    if problems:
        raise CheckpointError(
            f"{stored.path} does not hold the model that {described_by} describes: {listed(problems)}. "
            "Use a complete checkpoint and the description that belongs to it."
        )
