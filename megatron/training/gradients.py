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
    if topology.tp.size > 1:
        partial = [shard.gradient for shard in shards if shard.spec.gradient == "partial"]
        _all_reduce_together(partial, topology.tp)
        _sum_copies([copies for shard in shards for copies in _copies(shard, topology.tp)], topology.tp)
    for shard in shards:
        if shard.spec.tied:
            all_reduce(shard.gradient, topology.embedding)


def _copies(shard: Shard, tp: Axis) -> list[tuple[Tensor, int]]:
    """The gradients in `shard` of blocks with fewer units than tensor ranks, and how many ranks hold each unit."""
    copies = {block.name: block.num_copies(tp.size) for block in shard.spec.blocks if shard.spec.dim is not None}
    regions = [region for region in shard.regions(tp) if copies.get(region.name, 1) > 1]
    return [(shard.gradient[region.local_slices], copies[region.name]) for region in regions]


def _sum_copies(gradients: list[tuple[Tensor, int]], tp: Axis) -> None:
    """Each rank puts its gradient in its unit's slot, and the sum over all ranks is the sum over each unit's copies."""
    slots = [mine.new_zeros((tp.size // num_copies, *mine.shape)) for mine, num_copies in gradients]
    own = [slot[tp.rank // num_copies] for slot, (_, num_copies) in zip(slots, gradients, strict=True)]
    for slot, (mine, _) in zip(own, gradients, strict=True):
        slot.copy_(mine)
    _all_reduce_together(slots, tp)
    for slot, (mine, _) in zip(own, gradients, strict=True):
        mine.copy_(slot)


def _all_reduce_together(gradients: list[Tensor], axis: Axis) -> None:
    """One all-reduce for many small gradients."""
    if not gradients:
        return
    flat = all_reduce(torch.cat([gradient.flatten() for gradient in gradients]), axis)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
