"""Which activations are computed again in the backward pass instead of being kept.

Nothing here saves a random state: dropout masks are a function of their key (megatron.core.random),
so the second forward pass draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Checkpoint = Callable[..., Tensor]
"""Calls its first argument with the others, keeping only the inputs for the backward pass, or keeping all."""


@dataclass(frozen=True)
class RecomputePolicy:
    """`selective` recomputes the attention core of every layer; `full` recomputes whole layers.

    full + uniform: every group of `num_layers` layers keeps only its input. full + block: the first
    `num_layers` layers of each stage are recomputed one by one, the others kept.
    """

    granularity: Literal["selective", "full"] | None = None
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1

    @property
    def attention_core(self) -> Checkpoint:
        return _recomputed if self.granularity == "selective" else _kept

    def num_recomputed(self, num_layers: int) -> int:
        """How many of a stage's `num_layers` layers run forward once more before their backward pass."""
        return sum(len(group) for group, call in self.groups(num_layers) if call is _recomputed)

    def groups(self, num_layers: int) -> list[tuple[range, Checkpoint]]:
        """Consecutive groups of a stage's `num_layers` layers, and how each group is called."""
        if self.granularity != "full":
            return [(range(num_layers), _kept)]
        if self.method == "uniform":
            starts = range(0, num_layers, self.num_layers)
            return [(range(i, min(i + self.num_layers, num_layers)), _recomputed) for i in starts]
        recomputed = min(self.num_layers, num_layers)
        return [(range(i, i + 1), _recomputed) for i in range(recomputed)] + [(range(recomputed, num_layers), _kept)]


def _kept(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


_recomputed: Final[Checkpoint] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
