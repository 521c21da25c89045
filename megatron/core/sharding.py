"""How a stored parameter is cut from logical tensors.

A *logical tensor* has a global name and a global shape (``layers.7.attention.q.weight``). A stored
parameter is one `Block` or several fused ones (q | k | v), cut over the tensor axis along one
dimension at unit boundaries. What a rank holds is always a set of rectangles of logical tensors:
`ShardSpec.regions` lists them, and initialisation, gradient norm, checkpoints, resharding and
conversion read that list and nothing else. A data-parallel shard is a range of rows of the local
tensor, so it is a set of rectangles as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from megatron.errors import ConfigError

GradientKind: TypeAlias = Literal["complete", "partial"]


@dataclass(frozen=True)
class Block:
    """One logical tensor inside a stored parameter.

    `units` is the number of indivisible pieces along the cut dimension (heads, features, vocabulary
    rows). Fewer units than tensor ranks means copies. `padded_units` counts the units that are stored
    over all ranks when that is more than there are: the padding belongs to the layout, so no region
    covers it, it is zero, and it stays zero.
    """

    name: str
    global_shape: tuple[int, ...]
    units: int = 1
    padded_units: int | None = None

    @property
    def stored_units(self) -> int:
        return self.units if self.padded_units is None else self.padded_units

    def num_copies(self, tp_size: int) -> int:
        """How many tensor ranks hold each unit. Raises ConfigError if the units cannot be dealt out evenly."""
        if self.stored_units % tp_size == 0:
            return 1
        if tp_size % self.stored_units == 0:
            return tp_size // self.stored_units
        raise ConfigError(
            f"{self.name}: {self.stored_units} units cannot be split over --tensor_model_parallel_size {tp_size}; "
            f"use a divisor or a multiple of {self.stored_units}."
        )

    def unit_range(self, tp_rank: int, tp_size: int) -> range:
        """The units this tensor rank stores (padding included)."""
        copies = self.num_copies(tp_size)
        per_rank = self.stored_units * copies // tp_size
        first = tp_rank // copies * per_rank
        return range(first, first + per_rank)


@dataclass(frozen=True)
class Cut:
    """How the tensor axis cuts a logical tensor: along which dimension, and whether into equal parts. Padding makes
    them unequal: all but the last have the rows that a padded tensor would give them.
    """

    dim: int
    is_even: bool = True


@dataclass(frozen=True)
class Region:
    """A rectangle of one logical tensor, and where it lies in the local tensor. All in elements.

    `copy` is 0 for the one holder that counts in norms and writes the checkpoint. `cut` is that of its tensor, on any
    number of ranks; None where all of them hold it whole.
    """

    name: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    local_start: tuple[int, ...]
    copy: int = 0
    cut: Cut | None = None

    @property
    def local_slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.local_start, self.size, strict=True))

    @property
    def global_slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))


@dataclass(frozen=True)
class ShardSpec:
    """Blocks stacked along `dim`, each cut there over the tensor axis; `dim` None means every rank holds all of it.

    `gradient` is "partial" where each tensor rank sees only its part of the sequence, so that the
    gradients of a parameter held by all ranks must be summed over them. `tied` marks a parameter that
    two pipeline stages hold: its owner, and the other stage's copy.
    """

    blocks: tuple[Block, ...]
    dim: int | None = None
    gradient: GradientKind = "complete"
    tied: Literal["owner", "copy"] | None = None

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of the stored parameter on each tensor rank (alike on all)."""
        shape = list(self.blocks[0].global_shape)
        if self.dim is not None:
            shape[self.dim] = sum(len(b.unit_range(0, tp_size)) * self._unit_size(b) for b in self.blocks)
        return tuple(shape)

    def regions(self, tp_rank: int, tp_size: int, shard: int = 0, num_shards: int = 1) -> list[Region]:
        """What lies in rows-shard `shard` of `num_shards` of the local tensor of `tp_rank`.

        Rows are dealt out as torch.chunk and FSDP do: ``ceil(rows / num_shards)`` to each, the last ones
        getting fewer or none. Rectangles without elements are left out.
        """
        rows = self.local_shape(tp_size)[0]
        per_shard = -(-rows // num_shards)
        first, last = min(rows, shard * per_shard), min(rows, (shard + 1) * per_shard)
        whole = self._whole_regions(tp_rank, tp_size)
        return [cut for region in whole if (cut := _cut_rows(region, first, last)) is not None]

    def take(self, full: Mapping[str, Tensor], tp_rank: int, tp_size: int) -> Tensor:
        """The local tensor cut out of whole logical tensors; padding is zero."""
        like = full[self.blocks[0].name]
        local = torch.zeros(self.local_shape(tp_size), dtype=like.dtype, device=like.device)
        fill(local, self.regions(tp_rank, tp_size), lambda region: full[region.name][region.global_slices])
        return local

    def _unit_size(self, block: Block) -> int:
        assert self.dim is not None
        return block.global_shape[self.dim] // block.units

    def _whole_regions(self, tp_rank: int, tp_size: int) -> list[Region]:
        if self.dim is None:
            (block,) = self.blocks
            origin = (0,) * len(block.global_shape)
            return [self._region(block, origin, block.global_shape, origin, copy=tp_rank)]
        regions, position = [], 0
        for block in self.blocks:
            units, unit_size = block.unit_range(tp_rank, tp_size), self._unit_size(block)
            real = range(units.start, min(units.stop, block.units))
            start, size, local_start = (
                [0] * len(block.global_shape),
                list(block.global_shape),
                [0] * len(block.global_shape),
            )
            start[self.dim], size[self.dim] = real.start * unit_size, len(real) * unit_size
            local_start[self.dim] = position
            position += len(units) * unit_size
            if size[self.dim]:
                copy = tp_rank % block.num_copies(tp_size)
                regions.append(self._region(block, tuple(start), tuple(size), tuple(local_start), copy))
        return regions

    def _region(
        self, block: Block, start: tuple[int, ...], size: tuple[int, ...], local_start: tuple[int, ...], copy: int
    ) -> Region:
        return Region(
            name=block.name,
            global_shape=block.global_shape,
            start=start,
            size=size,
            local_start=local_start,
            copy=copy + 1 if self.tied == "copy" else copy,
            cut=None if self.dim is None else Cut(self.dim, is_even=block.padded_units is None),
        )


def fill(local: Tensor, regions: list[Region], read: Callable[[Region], Tensor]) -> None:
    """Copies each region, as `read` returns it, into its place in `local`. What no region covers is left alone."""
    with torch.no_grad():
        for region in regions:
            local[region.local_slices].copy_(read(region))


def _cut_rows(region: Region, first: int, last: int) -> Region | None:
    """The part of `region` in rows [first, last) of the local tensor, placed relative to row `first`."""
    top = max(first, region.local_start[0])
    bottom = min(last, region.local_start[0] + region.size[0])
    if bottom <= top:
        return None
    skipped = top - region.local_start[0]
    return Region(
        name=region.name,
        global_shape=region.global_shape,
        start=(region.start[0] + skipped, *region.start[1:]),
        size=(bottom - top, *region.size[1:]),
        local_start=(top - first, *region.local_start[1:]),
        copy=region.copy,
        cut=region.cut,
    )
