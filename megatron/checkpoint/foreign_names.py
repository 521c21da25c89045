"""Which of the tensors in a training program's checkpoint are a model's weights and Adam's moments.

Programs wrap models: a name may carry a prefix ("model.", "app.model.") and the wrappers of compiled or sharded modules
within. What is left is one of two spellings, Hugging Face's or Meta's, and is looked for by the name of the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from megatron.checkpoint.hf_family import Family
from megatron.checkpoint.hf_tensors import StoredTensor, stored_tensors
from megatron.checkpoint.named_tensors import NamedTensors, Renamed, check_holds
from megatron.errors import CheckpointError, listed
from megatron.model.config import ModelConfig

_WRAPPERS: Final = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Of several copies of a model (averaged weights, say) the one that is trained.
_USUAL_PREFIXES: Final = ("", "model.", "app.model.", "module.", "model.module.")
_COMPARED_ROWS: Final = 4096


class HuggingFaceTensors:
    """A model's logical tensors, by native name, read from `stored`, which has them under a family's names.

    See `MetaTensors`, which is the same for Meta's names.
    """

    def __init__(
        self,
        stored: NamedTensors,
        family: Family,
        model: ModelConfig,
        shapes: Mapping[str, tuple[int, ...]],
        described_by: str,
    ):
        self.path = stored.path
        self._stored, self._shapes = stored, shapes
        tensors = stored_tensors(family, model, shapes)
        self._holder: dict[str, StoredTensor] = {part: tensor for tensor in tensors for part in tensor.parts}
        check_holds(stored, {tensor.name: tensor.shape for tensor in tensors}, described_by)

    def names(self) -> Sequence[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._stored.dtype(self._holder[name].name)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        holder = self._holder[name]
        return holder.read_part(name, start, size, partial(self._stored.read, holder.name))


def unwrapped(stored: NamedTensors) -> Renamed:
    """`stored` without the wrappers' parts of names."""
    names = {_WRAPPERS.sub("", name): name for name in stored.names()}
    if len(names) < len(stored.names()):
        twice = sorted(set(stored.names()) - set(names.values()))
        raise CheckpointError(
            f"{stored.path} holds {listed(twice)} twice, once in a wrapped module; remove one of them."
        )
    return Renamed(stored, names)


def find_prefix(stored: NamedTensors, name: str, *, suffix: str = "") -> str | None:
    """What stands before ``name + suffix`` in one of the names of `stored`; None if none ends so."""
    ending = name + suffix
    prefixes = [
        held.removesuffix(ending)
        for held in stored.names()
        if held.endswith(ending) and (held == ending or held[-len(ending) - 1] == ".")
    ]
    usual = [prefix for prefix in _USUAL_PREFIXES if prefix in prefixes]
    if len(prefixes) > 1 and len(usual) != 1:
        raise CheckpointError(
            f"{stored.path} holds several models ({listed(prefix + ending for prefix in prefixes)}); keep one of them."
        )
    return next(iter(usual or prefixes), None)


def below(stored: NamedTensors, prefix: str, expected: Sequence[str]) -> Renamed:
    """The tensors whose names, but for `prefix`, start with the same module as one of `expected`."""
    modules = {name.split(".", 1)[0] for name in expected}
    found = {name.removeprefix(prefix): name for name in stored.names() if name.startswith(prefix)}
    return Renamed(stored, {short: name for short, name in found.items() if short.split(".", 1)[0] in modules})


def without(stored: NamedTensors, is_left_out: Callable[[str], bool]) -> Renamed:
    return Renamed(stored, {name: name for name in stored.names() if not is_left_out(name)})


def is_repeated(stored: NamedTensors, name: str, other: str) -> bool:
    """Whether both tensors are there and equal: a tied head is often stored a second time."""
    if not {name, other} <= set(stored.names()):
        return False
    if (stored.shape(name), stored.dtype(name)) != (stored.shape(other), stored.dtype(other)):
        return False
    return all(map(torch.equal, _rows(stored, name), _rows(stored, other)))


def _rows(stored: NamedTensors, name: str) -> Iterator[Tensor]:
    shape = stored.shape(name)
    for row in range(0, shape[0], _COMPARED_ROWS):
        yield stored.read(name, (row, *(0 for _ in shape[1:])), (min(_COMPARED_ROWS, shape[0] - row), *shape[1:]))
