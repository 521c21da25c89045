"""The optimizer's state in a rank's file: which of its tensors belongs to which parameter.

A file numbers parameters: first the matrices, which decay, then the vectors, each in the order in which modules were
registered. That is the order of the keys in the file, but for a head that is a parameter of the whole language model:
it comes first; and for the heads of a BERT, which come behind the last stage's copy of the embedding. Masters in fp32,
which exist beside half-precision weights, prove the order by their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from megatron.checkpoint.legacy.keys import HEAD, HEAD_COPY, HEAD_MODULE
from megatron.checkpoint.source import MODEL

# The tensors that an optimizer keeps for every parameter -> its name.
_OPTIMIZERS: Final = ((("exp_avg", "exp_avg_sq"), "adam"), (("momentum_buffer",), "sgd"))
_HALF: Final = (torch.float16, torch.bfloat16)
_COMPARED_ELEMENTS: Final = 1024
DISTRIBUTED_OPTIMIZER: Final = "a distributed optimizer keeps it in files of its own"

Chunks = Sequence[Mapping[str, Tensor]]


class UnreadableOptimizerStateError(Exception):
    """Its message says what of the state is not as it is known to be. The weights can be read all the same."""


@dataclass(frozen=True)
class OptimizerState:
    """`tensors` of each chunk: kind ("model" for masters, "optimizer.exp_avg", ...) -> key -> tensor."""

    optimizer: str
    tensors: tuple[Mapping[str, Mapping[str, Tensor]], ...]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each kind."""
        return {kind: next(iter(held.values())).dtype for chunk in self.tensors for kind, held in chunk.items() if held}


def find_optimizer_state(state: Mapping[str, Any], chunks: Chunks) -> OptimizerState | None:
    """None if the file has none. `chunks` are the model's own tensors by key, as the file orders them."""
    if (saved := state.get("optimizer")) is None:
        return None
    groups, entries = _numbered(saved)
    names, optimizer = _names(entries)
    order = _order(chunks, [len(group["params"]) for group in groups], [entry[names[0]] for entry in entries])
    held = {f"optimizer.{name}": [entry[name] for entry in entries] for name in names}
    if masters := _masters(saved, chunks, order):
        held[MODEL] = masters
    tensors: tuple[dict[str, dict[str, Tensor]], ...] = tuple({kind: {} for kind in held} for _ in chunks)
    for kind, values in held.items():
        for (chunk, key), value in zip(order, values, strict=True):
            tensors[chunk][kind][key] = value
    return OptimizerState(optimizer, tensors)


def count_steps(state: Mapping[str, Any]) -> int:
    """Of a file that has an optimizer's state, read with values.

    Apex counts steps for a group, torch for a parameter; SGD counts none, and the iteration stands in.
    """
    groups, entries = _numbered(state["optimizer"])
    counted = {int(owner["step"]) for owner in (*groups, *entries) if "step" in owner}
    if len(counted) > 1:
        raise UnreadableOptimizerStateError(f"its parameters have made different numbers of steps: {sorted(counted)}")
    iteration = state.get("iteration")
    return counted.pop() if counted else iteration if isinstance(iteration, int) else 0


def check_masters(found: OptimizerState, chunks: Chunks) -> None:
    """Raises UnreadableOptimizerStateError if a master, rounded, is not its weight: then the order is another."""
    for weights, tensors in zip(chunks, found.tensors, strict=True):
        for key, master in tensors.get(MODEL, {}).items():
            ours, theirs = (tensor.flatten()[:_COMPARED_ELEMENTS] for tensor in (weights[key], master))
            if not torch.equal(theirs.to(ours.dtype), ours):
                raise UnreadableOptimizerStateError(f"its fp32 values are not those of {key}")


def _numbered(saved: object) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The groups of parameters, and what is kept for each parameter in the order of their numbers."""
    inner = saved.get("optimizer", saved) if isinstance(saved, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("param_groups"), list):
        raise UnreadableOptimizerStateError("it is in no form that is known")
    if not inner.get("state"):
        raise UnreadableOptimizerStateError(DISTRIBUTED_OPTIMIZER)
    try:
        numbers = [number for group in inner["param_groups"] for number in group["params"]]
        entries = [inner["state"][number] for number in numbers]
    except (KeyError, TypeError) as error:
        raise UnreadableOptimizerStateError("it does not have something for every parameter") from error
    if not all(isinstance(entry, Mapping) for entry in entries):
        raise UnreadableOptimizerStateError("it is in no form that is known")
    return inner["param_groups"], entries


def _names(entries: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], str]:
    for names, optimizer in _OPTIMIZERS:
        if all(isinstance(entry.get(name), Tensor) for entry in entries for name in names):
            return names, optimizer
    raise UnreadableOptimizerStateError("it is neither that of Adam nor of SGD with momentum")


def _order(chunks: Chunks, sizes: Sequence[int], values: Sequence[Tensor]) -> list[tuple[int, str]]:
    """(chunk, key) of each numbered parameter."""
    for head_first in (True, False):
        named = list(_named_parameters(chunks, head_first=head_first))
        groups = [[place for place in named if (chunks[place[0]][place[1]].ndim > 1) == decays] for decays in (1, 0)]
        groups = [group for group in groups if group]
        order = [place for group in groups for place in group]
        fits = [chunks[chunk][key].shape for chunk, key in order] == [value.shape for value in values]
        if fits and [len(group) for group in groups] == list(sizes):
            return order
    raise UnreadableOptimizerStateError("its tensors are not those of the model's parameters")


def _named_parameters(chunks: Chunks, *, head_first: bool) -> Iterator[tuple[int, str]]:
    for number, chunk in enumerate(chunks):
        if head_first:
            yield from ((number, key) for key in chunk if key == HEAD)
        yield from ((number, key) for key in _registered(chunk) if not (head_first and key == HEAD))


def _registered(chunk: Mapping[str, Tensor]) -> Iterator[str]:
    """The keys with the copy of the embedding before a BERT's heads, behind which it is stored."""
    copy = [key for key in chunk if key == HEAD_COPY]
    for key in chunk:
        if copy and key.startswith((HEAD_MODULE, "binary_head.")):
            yield copy.pop()
        if key != HEAD_COPY:
            yield key
    yield from copy


def _masters(saved: Mapping[str, Any], chunks: Chunks, order: Sequence[tuple[int, str]]) -> list[Tensor]:
    """The fp32 values of half-precision weights, in `order`; none if the weights are fp32 themselves."""
    stored = saved.get("fp32_from_fp16_params", saved.get("fp32_from_fp16"))
    weights = [chunks[chunk][key] for chunk, key in order]
    if not any(weight.dtype in _HALF for weight in weights):
        return []
    masters = [master for group in stored for master in group] if isinstance(stored, list) else []
    if not all(isinstance(master, Tensor) for master in masters):
        raise UnreadableOptimizerStateError("its fp32 values are in no form that is known")
    if [master.shape for master in masters] != [weight.shape for weight in weights]:
        raise UnreadableOptimizerStateError("its fp32 values are not those of the model's parameters")
    return [master.detach() for master in masters]
