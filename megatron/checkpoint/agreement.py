"""All ranks succeed or all ranks raise: nobody returns from a save or a load that failed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.core.topology import Axis
from megatron.errors import CheckpointError

T = TypeVar("T")

_MAX_LISTED = 4


def on_every_rank(world: Axis, action: Callable[[], T]) -> T:
    """Runs `action` on every rank and returns this rank's value once all are done.

    If it fails anywhere, every rank raises the same CheckpointError, which names the ranks and their causes.
    """
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:  # whatever it is, the other ranks wait for a word
        failure = error
    causes: list[str | None] = [None if failure is None else _cause(failure)]
    if world.size > 1:
        causes *= world.size
        dist.all_gather_object(causes, causes[world.rank], group=world.group)
    if any(cause is not None for cause in causes):
        if failure is not None and not isinstance(failure, (CheckpointError, OSError)):
            raise failure  # our own bug keeps its traceback
        raise CheckpointError(_summary(causes)) from failure
    return value


def on_first_rank(world: Axis, action: Callable[[], T]) -> T:
    """Runs `action` on rank 0 alone and returns its value on every rank, with the same agreement on failure."""
    value = on_every_rank(world, action if world.is_first else lambda: None)
    if world.size > 1:
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=world.global_ranks[0], group=world.group)
        value = box[0]
    return value  # type: ignore[return-value]


def gather_to_first(world: Axis, value: T) -> list[T]:
    """The values of all ranks, in rank order, on rank 0; nothing elsewhere."""
    if world.size == 1:
        return [value]
    values: list[Any] | None = [None] * world.size if world.is_first else None
    dist.gather_object(value, values, dst=world.global_ranks[0], group=world.group)
    return values or []


def _cause(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{type(error).__name__}: {error}"


def _summary(causes: list[str | None]) -> str:
    """One cause alone if all ranks have it, else each with its rank."""
    if len(set(causes)) == 1:
        return str(causes[0])
    failed = [f"rank {number}: {cause}" for number, cause in enumerate(causes) if cause is not None]
    more = f" | and {len(failed) - _MAX_LISTED} more ranks" if len(failed) > _MAX_LISTED else ""
    return " | ".join(failed[:_MAX_LISTED]) + more
