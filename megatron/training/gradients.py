"""What remains to be summed once every rank has its gradients over the data axis.

All of it is linear, so any order gives the same gradients; this is the fixed one: parameters that all
tensor ranks hold, copies of key/value heads, tied embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.collectives import all_reduce
from megatron.core.data_parallel import Shard
from megatron.core.topology import Axis, Topology


def sum_shared_gradients(shards: Sequence[Shard], topology: Topology) -> None:
    """Makes the gradient of everything that is held more than once complete and equal on all its holders."""
    partial = [_gradient(shard) for shard in shards if shard.spec.gradient == "partial"]
    _all_reduce_together(partial, topology.tp)
    for shard in shards:
        _sum_copies(shard, topology.tp)
    for shard in shards:
        if shard.spec.tied:
            all_reduce(_gradient(shard), topology.embedding)


def _sum_copies(shard: Shard, tp: Axis) -> None:
    """Adds up the gradients of blocks with fewer units than tensor ranks: each rank puts its own in its unit's slot."""
    copies = {block.name: block.num_copies(tp.size) for block in shard.spec.blocks if shard.spec.dim is not None}
    for region in shard.regions(tp):
        if copies.get(region.name, 1) == 1:
            continue
        mine = _gradient(shard)[region.local_slices]
        slots = mine.new_zeros((tp.size // copies[region.name], *mine.shape))
        slot = tp.rank // copies[region.name]
        slots[slot] = mine
        mine.copy_(all_reduce(slots, tp)[slot])


def _all_reduce_together(gradients: list[Tensor], axis: Axis) -> None:
    """One all-reduce for many small gradients."""
    if axis.size == 1 or not gradients:
        return
    flat = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), axis)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _gradient(shard: Shard) -> Tensor:
    assert shard.tensor.grad is not None
    return shard.tensor.grad
