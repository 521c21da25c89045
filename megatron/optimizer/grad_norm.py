"""The gradient norm of the whole model, each logical element counted once, and clipping by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.data_parallel import Shard
from megatron.core.sharding import Region
from megatron.core.topology import Topology

# torch adds up a norm on the CPU element after element: 32 million fp32 elements at once are off by 0.2%.
PIECE_ELEMENTS = 2**18


class GradientNorm:
    """The L2 norm over all logical tensors on all ranks, in float64 however the gradients are cut.

    Copies (key/value heads held by several tensor ranks, tied embeddings on two stages, replicas on the
    data axis) count once, padding does not count. What counts is decided here, once. A rank gives its summand
    of the square, and the caller adds them up together with whatever else the ranks have to agree on.
    """

    def __init__(self, shards: Sequence[Shard], topology: Topology):
        self._device = topology.device
        self._counted = [(shard, slices) for shard in shards if shard.trainable for slices in _counted(shard, topology)]

    def local_square(self) -> Tensor:
        """0-dim, float64, on the device: this rank's summand of the squared norm; inf or nan where a gradient is."""
        gradients = [shard.gradient[slices] for shard, slices in self._counted]
        pieces = [piece for gradient in gradients for piece in gradient.reshape(-1).split(PIECE_ELEMENTS)]
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        if pieces:
            square += torch.stack(torch._foreach_norm(pieces)).double().square().sum()
        return square


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of this norm with so that it is at most `max_norm`; 1 when `max_norm` is 0 (never).

    A norm that is not finite gives a meaningless factor: the caller looks at the norm first.
    """
    # The small number keeps the factor finite for a zero gradient, as torch.nn.utils.clip_grad_norm_ does.
    return 1.0 if max_norm == 0 else min(1.0, max_norm / (norm + 1e-6))


def scale_gradients(shards: Sequence[Shard], factor: float) -> None:
    """Multiplies every gradient by `factor`, in place."""
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
