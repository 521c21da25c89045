"""What two checkpoints differ in, whatever their formats and layouts: tensor by tensor, some rows at a time."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.hf_config import architecture_differences
from megatron.checkpoint.source import MODEL, Source

_CHUNK_BYTES = 4 * 2**20
_MAX_LISTED = 20


@dataclass(frozen=True)
class TensorDifference:
    """How an entry of one checkpoint differs from the other's. Only values of equal shapes are compared.

    `num_different` counts elements with other bits, after widening where the dtypes differ; `max_abs` is the largest
    difference of two numbers, NaN if a NaN stands against anything else.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[torch.dtype, torch.dtype]
    num_different: int = 0
    max_abs: float = 0.0

    @property
    def is_equal(self) -> bool:
        return self.shapes[0] == self.shapes[1] and self.dtypes[0] == self.dtypes[1] and not self.num_different

    def __str__(self) -> str:
        if self.shapes[0] != self.shapes[1]:
            return f"{self.name}: shape {list(self.shapes[0])} and {list(self.shapes[1])}"
        what = f"{self.num_different} of {math.prod(self.shapes[0])} elements differ, by at most {self.max_abs:.3g}"
        if self.dtypes[0] == self.dtypes[1]:
            return f"{self.name}: {what}"
        one, other = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"{self.name}: {one} and {other}, {what if self.num_different else 'with the same values'}"


@dataclass(frozen=True)
class Difference:
    """`settings` has (what, in one, in the other); `missing` the entries that one side lacks, by side."""

    settings: tuple[tuple[str, object, object], ...]
    missing: tuple[tuple[str, ...], tuple[str, ...]]
    tensors: tuple[TensorDifference, ...]
    num_compared: int

    @property
    def is_empty(self) -> bool:
        return not self.settings and not any(self.missing) and not self.tensors

    def lines(self, one: Path, other: Path) -> list[str]:
        """For the terminal; the last line sums up."""
        return [
            *(f"{what}: {mine} and {theirs}" for what, mine, theirs in self.settings),
            *_some([f"only in {other}: {name}" for name in self.missing[0]]),
            *_some([f"only in {one}: {name}" for name in self.missing[1]]),
            *_some([str(tensor) for tensor in self.tensors]),
            f"{self.num_compared} tensors compared: {self.num_compared - len(self.tensors)} equal bit by bit, "
            f"{len(self.tensors)} different; without counterpart: {len(self.missing[0]) + len(self.missing[1])}; "
            f"settings that differ: {len(self.settings)}",
        ]


def is_weights_only(source: Source) -> bool:
    """Whether its format holds nothing of a run but the weights."""
    return source.state() is None


def compare(
    one: Source,
    other: Source,
    *,
    weights_only: bool = False,
    num_workers: int = 1,
    on_bytes: Callable[[int], object],
) -> Difference:
    """Compares everything that both sides record. `on_bytes` hears of the bytes read of `one`."""
    names = _compared_names(one, other, weights_only=weights_only)
    common = [name for name in names[0] if name in set(names[1])]
    lock = threading.Lock()

    def report(num_bytes: int) -> None:
        with lock:
            on_bytes(num_bytes)

    with ThreadPoolExecutor(num_workers) as executor:
        tensors = list(executor.map(lambda name: _compare_tensor(one, other, name, report), common))
    return Difference(
        settings=tuple(_setting_differences(one, other, weights_only=weights_only)),
        missing=(_without(names[1], names[0]), _without(names[0], names[1])),
        tensors=tuple(tensor for tensor in tensors if not tensor.is_equal),
        num_compared=len(common),
    )


def _compared_names(one: Source, other: Source, *, weights_only: bool = False) -> tuple[list[str], list[str]]:
    """The entries of each side that count: weights alone if asked for, or if one side's format holds nothing else."""
    if weights_only or is_weights_only(one) or is_weights_only(other):
        mine, theirs = ([name for name in side.names() if name.startswith(f"{MODEL}.")] for side in (one, other))
        return mine, theirs
    return list(one.names()), list(other.names())


def _some(lines: list[str]) -> list[str]:
    more = [f"... and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    return lines[:_MAX_LISTED] + more


def _without(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    known = set(others)
    return tuple(name for name in names if name not in known)


def _setting_differences(one: Source, other: Source, *, weights_only: bool) -> list[tuple[str, object, object]]:
    configs = architecture_differences(one.model_config(), other.model_config())
    found: list[tuple[str, object, object]] = [(f"model.{name}", *pair) for name, pair in configs.items()]
    for name, mine, theirs in (
        ("model_name", one.model_name(), other.model_name()),
        ("tokenizer.sha256", _tokenizer_sha256(one), _tokenizer_sha256(other)),
    ):
        if None not in (mine, theirs) and mine != theirs:  # what only one side's format records is no difference
            found.append((name, mine, theirs))
    states = one.state(), other.state()
    if not weights_only and states[0] is not None and states[1] is not None:
        values = [dict(_flat("", dataclasses.asdict(state))) for state in states if state is not None]
        for name in dict.fromkeys([*values[0], *values[1]]):
            pair = values[0].get(name), values[1].get(name)
            if pair[0] != pair[1]:
                found.append((name, *pair))
    return found


def _tokenizer_sha256(source: Source) -> str | None:
    tokenizer = source.tokenizer()
    return None if tokenizer is None else tokenizer.sha256


def _flat(prefix: str, value: object) -> list[tuple[str, object]]:
    """Every value under a dotted name."""
    if isinstance(value, Mapping):
        return [item for key, held in value.items() for item in _flat(f"{prefix}.{key}".lstrip("."), held)]
    return [(prefix, value)]


def _compare_tensor(one: Source, other: Source, name: str, on_bytes: Callable[[int], None]) -> TensorDifference:
    shapes = tuple(one.shape(name)), tuple(other.shape(name))
    dtypes = one.dtype(name), other.dtype(name)
    if shapes[0] != shapes[1]:
        return TensorDifference(name, shapes, dtypes)
    num_different, max_abs = 0, 0.0
    for start, size in _row_ranges(shapes[0], max(dtype.itemsize for dtype in dtypes)):
        mine, theirs = one.read(name, start, size), other.read(name, start, size)
        on_bytes(mine.nbytes)
        if mine.dtype != theirs.dtype:
            wide = torch.promote_types(mine.dtype, theirs.dtype)
            mine, theirs = mine.to(wide), theirs.to(wide)
        differ = _bits(mine) != _bits(theirs)
        if differ.any():
            num_different += int(differ.sum())
            distance = (mine[differ].double() - theirs[differ].double()).abs().max().item()
            max_abs = distance if math.isnan(distance) or distance > max_abs else max_abs
    return TensorDifference(name, shapes, dtypes, num_different, max_abs)


def _row_ranges(shape: tuple[int, ...], itemsize: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    if not shape:
        return [((), ())]
    step = max(1, _CHUNK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    rest = (0,) * len(shape[1:])
    return [((row, *rest), (min(step, shape[0] - row), *shape[1:])) for row in range(0, shape[0], step)]


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: a NaN equals itself, and 0 is not -0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])
