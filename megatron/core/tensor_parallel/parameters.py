"""A module says how its parameters are cut in its `specs`; everybody else asks `shard_specs`."""

from __future__ import annotations

import torch
from torch import nn

from megatron.core.sharding import GradientKind, ShardSpec


class ShardedModule(nn.Module):
    """A module that allocates its own parameters from ShardSpecs and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, ShardSpec] = {}

    def declare(self, name: str, spec: ShardSpec, tp_size: int) -> None:
        """Registers an uninitialised parameter of the spec's local shape under `name`."""
        self.specs[name] = spec
        self.register_parameter(name, nn.Parameter(torch.empty(spec.local_shape(tp_size))))


def replicated_gradient(sequence_parallel: bool) -> GradientKind:
    """The gradient of a parameter that all tensor ranks hold: each sees only its part of a cut sequence."""
    return "partial" if sequence_parallel else "complete"


def shard_specs(module: nn.Module) -> dict[str, ShardSpec]:
    """Parameter path -> ShardSpec for every parameter of `module`, in `named_parameters` order."""
    specs = {
        f"{path}.{name}" if path else name: spec
        for path, child in module.named_modules()
        if isinstance(child, ShardedModule)
        for name, spec in child.specs.items()
    }
    return {name: specs[name] for name, _ in module.named_parameters()}
