"""`--compile`: the elementwise work between linears and collectives as fused kernels.

Such an *island* is a function of tensors with no parameter of its own, no collective and no decision that depends on
a value. Eagerly it is a hand-written autograd function, compiled it is the plain expression, which the compiler
differentiates and fuses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@cache
def compiled(expression: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`expression` as one graph for each shape, type and device it is called with; the second call is free.

    Modules share what is compiled, for their weights are arguments: all layers of a model need one graph.
    """
    return torch.compile(expression, fullgraph=True, dynamic=False)
