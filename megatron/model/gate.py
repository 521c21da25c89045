"""Gated activations (Shazeer 2020, arXiv 2002.05202) of a fused gate | up projection.

Legend: f features of one half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GateName = Literal["swiglu", "geglu", "geglu_tanh", "liglu", "reglu"]


def gated_activation(gate_up: Tensor, name: GateName) -> Tensor:
    """[..., 2f] -> act(gate) * up: [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[name](gate) * up


class GatedActivation(torch.autograd.Function):
    """`gated_activation` that keeps only its input, and writes both halves of the gradient into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, name: GateName) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.name = name
        return gated_activation(gate_up, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_both = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_both.chunk(2, dim=-1)
        torch.mul(grad, _ACTIVATIONS[ctx.name](gate), out=grad_up)
        _DERIVATIVES[ctx.name](grad * up, gate, grad_gate)
        return grad_both, None


def _identity(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "swiglu": F.silu,
        "geglu": F.gelu,
        "geglu_tanh": partial(F.gelu, approximate="tanh"),
        "liglu": _identity,
        "reglu": F.relu,
    }
)

Derivative = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(gradient of the activation's output, its input, where to write the gradient of its input)."""

_DERIVATIVES: Final[Mapping[str, Derivative]] = MappingProxyType(
    {
        "swiglu": lambda grad, x, out: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out),
        "geglu": lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out),
        "geglu_tanh": lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(
            grad, x, approximate="tanh", grad_input=out
        ),
        "liglu": lambda grad, x, out: out.copy_(grad),
        "reglu": lambda grad, x, out: torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    }
)
