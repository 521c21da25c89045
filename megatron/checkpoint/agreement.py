"""All ranks succeed or all ranks raise: nobody returns from a save or a load that failed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.core.topology import Axis
from megatron.errors import CheckpointError, DamagedCheckpointError

T = TypeVar("T")

_MAX_LISTED = 4


def on_every_rank(world: Axis, action: Callable[[], T]) -> T:
    """Runs `action` on every rank and returns this rank's value once all are done.

    If it fails anywhere, every rank raises the same CheckpointError, which names the ranks and their causes: a
    DamagedCheckpointError if damage is all that went wrong.
    """
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:  # whatever it is, the other ranks wait for a word
        failure = error
    failures: list[_Failure | None] = [None if failure is None else _describe(failure)]
    if world.size > 1:
        failures *= world.size
        dist.all_gather_object(failures, failures[world.rank], group=world.group)
    if any(failures):
        if failure is not None and not isinstance(failure, (CheckpointError, OSError)):
            raise failure  # our own bug keeps its traceback
        is_damage = all(other.is_damage for other in failures if other is not None)
        kind = DamagedCheckpointError if is_damage else CheckpointError
        raise kind(_summary(failures)) from failure
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


def gather_to_all(world: Axis, value: T) -> list[T]:
    """The values of all ranks, in rank order."""
    values: list[Any] = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value, group=world.group)
    return values


@dataclass(frozen=True)
class _Failure:
    cause: str
    is_damage: bool


def _describe(error: Exception) -> _Failure:
    if isinstance(error, CheckpointError):
        cause = str(error)
    elif isinstance(error, OSError):
        cause = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        cause = f"{type(error).__name__}: {error}"
    return _Failure(cause, isinstance(error, DamagedCheckpointError))


def _summary(failures: list[_Failure | None]) -> str:
    """One cause alone if all ranks have it, else each with its rank."""
    causes = [None if failure is None else failure.cause for failure in failures]
    if len(set(causes)) == 1:
        return str(causes[0])
    failed = [f"rank {number}: {cause}" for number, cause in enumerate(causes) if cause is not None]
    more = f" | and {len(failed) - _MAX_LISTED} more ranks" if len(failed) > _MAX_LISTED else ""
    return " | ".join(failed[:_MAX_LISTED]) + more
