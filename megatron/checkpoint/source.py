"""What weights are read from, and how a rank's tensors are filled.

A *source* is anything that can hand out rectangles of named tensors: a checkpoint of this project, or a
Hugging Face folder read through its family's rules. Its *entries* are logical tensors with their kind in front:
``model.<logical name>``, ``optimizer.exp_avg.<logical name>``, ``optimizer.exp_avg_sq.<logical name>``,
``optimizer.momentum_buffer.<logical name>``. Nothing here knows of ranks or layouts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from megatron.core.sharding import Region, fill
from megatron.errors import CheckpointError, listed
from megatron.model.config import ModelConfig

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

MODEL = "model"

# What was read is still in the processor's cache when it is written, and allocations of this size reuse their pages.
_CHUNK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer the embedding rows belong to. `sha256` is that of its files, None where nobody computed it."""

    tokenizer_type: str
    tokenizer_model: str
    sha256: str | None = None


@dataclass(frozen=True)
class RunState:
    """Everything a run resumes from that is not a tensor. The mappings hold JSON values and belong to their owners.

    `optimizer` has its step counts, `scheduler` its position, `config` the whole resolved configuration of the run,
    `data` the number of samples of each dataset and a fingerprint of the training data (they decide the sample order).
    """

    iteration: int
    consumed_samples: int = 0
    seed: int | None = None
    optimizer: Mapping[str, JSON] = field(default_factory=dict)
    scheduler: Mapping[str, JSON] = field(default_factory=dict)
    config: Mapping[str, JSON] = field(default_factory=dict)
    data: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says besides its tensors. `model_name` is the preset or family the model was made from."""

    state: RunState
    model: ModelConfig
    model_name: str | None = None
    tokenizer: TokenizerIdentity | None = None


class Source(Protocol):
    """Anything weights can be read from. Every method raises CheckpointError where the stored data is damaged, and may
    be called from several threads."""

    @property
    def path(self) -> Path:
        """The folder, for messages."""

    def names(self) -> Sequence[str]:
        """All entry names, kind included."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of an entry; a vocabulary dimension is unpadded."""

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The rectangle ``start, size`` of an entry as a new contiguous CPU tensor of the entry's dtype.

        Reads little more than the bytes it needs, and verifies them where the format has checksums.
        """

    def model_config(self) -> ModelConfig: ...

    def model_name(self) -> str | None:
        """The preset or family the model was made from ("llama2"), None if that is not recorded."""

    def tokenizer(self) -> TokenizerIdentity | None: ...

    def state(self) -> RunState | None:
        """Where the run stood; None for a source that is weights only."""


@dataclass(frozen=True)
class LocalTensor:
    """What one rank holds of some entries of one kind: `regions` say which rectangle lies where in `tensor`.

    `kind` is "model", "optimizer.exp_avg", ... The same description serves loading (the tensor is filled in place;
    padding, which no region covers, is left alone) and saving (regions with copy 0 are written).
    """

    kind: str
    regions: Sequence[Region]
    tensor: Tensor

    def entry(self, region: Region) -> str:
        return f"{self.kind}.{region.name}"


def num_entry_bytes(source: Source, name: str) -> int:
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def row_chunks(source: Source, name: str, start: Sequence[int], size: Sequence[int]) -> Iterator[Tensor]:
    """The rectangle ``start, size`` of an entry, some rows at a time."""
    if not size:
        yield source.read(name, start, size)
        return
    row_bytes = math.prod(size[1:]) * source.dtype(name).itemsize
    step = max(1, _CHUNK_BYTES // max(1, row_bytes))
    for row in range(0, size[0], step):
        yield source.read(name, (start[0] + row, *start[1:]), (min(step, size[0] - row), *size[1:]))


def load_tensors(source: Source, tensors: Sequence[LocalTensor], *, narrow: bool = False) -> None:
    """Fills every tensor from `source`. Values are converted where that loses nothing (bf16 -> fp32).

    `narrow` also allows conversions that round. Raises one CheckpointError that lists all entries that are missing,
    have another shape, or would be rounded, before anything is read.
    """
    _check_fits(source, tensors, narrow=narrow)
    # Entries lie in the files in the order of their names: they are read from front to back.
    for local, region in sorted(((t, r) for t in tensors for r in t.regions), key=lambda pair: pair[0].entry(pair[1])):
        fill(local.tensor, [region], lambda r, local=local: source.read(local.entry(r), r.start, r.size))  # type: ignore[misc]


def _check_fits(source: Source, tensors: Iterable[LocalTensor], *, narrow: bool) -> None:
    stored = set(source.names())
    wrong: dict[str, str] = {}
    for local in tensors:
        for region in local.regions:
            name = local.entry(region)
            if name not in stored:
                wrong[name] = f"{name} is missing"
            elif source.shape(name) != region.global_shape:
                wrong[name] = f"{name} has shape {list(source.shape(name))}, not {list(region.global_shape)}"
            elif not narrow and torch.promote_types(source.dtype(name), local.tensor.dtype) != local.tensor.dtype:
                wrong[name] = f"{name} is {source.dtype(name)} and would be rounded to {local.tensor.dtype}"
    if wrong:
        raise CheckpointError(
            f"{source.path} does not fit: {listed(wrong.values())}. "
            "Load a checkpoint of this model, or with --finetune if only optimizer entries are missing."
        )
