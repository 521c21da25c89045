"""The gradient norm of the whole model, each logical element counted once, and clipping by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.collectives import all_reduce
from megatron.core.data_parallel import Shard
from megatron.core.sharding import Region
from megatron.core.topology import Topology


class GradientNorm:
    """The L2 norm over all logical tensors on all ranks, in the gradients' precision.

    Copies (key/value heads held by several tensor ranks, tied embeddings on two stages, replicas on the
    data axis) count once, padding does not count. What counts is decided here, once; a call makes one
    collective and never waits for the device.
    """

    def __init__(self, shards: Sequence[Shard], topology: Topology):
        self._topology = topology
        self._counted = [(shard, slices) for shard in shards if shard.trainable for slices in _counted(shard, topology)]
        self._dtype = next((shard.tensor.dtype for shard in shards if shard.trainable), torch.float32)

    def __call__(self) -> Tensor:
        """0-dim, on the device, and bitwise the same on all ranks; inf or nan where a gradient is."""
        gradients = [shard.gradient[slices] for shard, slices in self._counted]
        square = torch.zeros((), dtype=self._dtype, device=self._topology.device)
        if gradients:
            square += torch.stack(torch._foreach_norm(gradients)).square().sum()
        return all_reduce(square, self._topology.world).sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients of this norm with so that it is at most `max_norm`; 1 when `max_norm` is 0 (never).

    A norm that is not finite gives a factor that is not a number or zero: the caller looks at the norm first.
    """
    if max_norm == 0:
        return torch.ones_like(norm)
    # The small number keeps the factor finite for a zero gradient, as torch.nn.utils.clip_grad_norm_ does.
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def scale_gradients(shards: Sequence[Shard], factor: Tensor) -> None:
    """Multiplies every gradient by `factor` (0-dim), in place."""
    gradients = [shard.gradient for shard in shards if shard.trainable]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def _counted(shard: Shard, topology: Topology) -> list[tuple[slice, ...]]:
    """The parts of the shard's local tensor that this rank counts."""
    if shard.count == 1 and not topology.dp.is_first:
        return []
    regions = shard.regions(topology.tp)
    if all(region.copy == 0 for region in regions) and _num_elements(regions) == shard.tensor.numel() > 0:
        return [()]
    return [region.local_slices for region in regions if region.copy == 0]


def _num_elements(regions: Sequence[Region]) -> int:
    return sum(torch.Size(region.size).numel() for region in regions)
