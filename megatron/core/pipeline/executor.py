"""Runs a lowered program: the one loop behind every schedule, forward-only ones included."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron.core.pipeline.actions import Action, ActionKind, Value
from megatron.core.pipeline.lowering import Program
from megatron.core.pipeline.p2p import Wire

# gloo calls a send completed only once somebody has waited for it, so they cannot be polled.
MAX_LEAVING = 2

ForwardStep = Callable[[int, Tensor | None, int], Tensor]
"""(stage, input or None on the first stage, micro-batch) -> output; on the last stage the loss, a scalar."""

BeforeBackward = Callable[[int, bool], None]
"""(stage, whether this is its last backward pass of the run): lets the data-parallel engine time its reduction."""


class PipelineExecutor:
    """Executes this rank's part of `program`. Stages and micro-batches are numbered as in the program.

    Receives are posted where the program has them, which is ahead of the computation that needs them,
    and waited for there. A few sends may be under way at once, with their tensors; then the oldest is waited
    for, which cannot deadlock because the program runs even if every send is.
    """

    def __init__(self, program: Program, pipeline_rank: int):
        self.program = program
        self.actions = program.ranks[pipeline_rank]
        self.num_stages = program.placement.num_stages
        backwards = [action for action in self.actions if action.kind is ActionKind.B]
        self._last_backward = {action.stage: action for action in backwards}

    def run(self, forward: ForwardStep, wire: Wire, before_backward: BeforeBackward | None = None) -> None:
        """Runs all micro-batches. Gradients of parameters accumulate where autograd puts them."""
        state = _RunState(wire)
        for action in self.actions:
            if action.kind is ActionKind.F:
                self._forward(action, forward, state)
            elif action.kind is ActionKind.B:
                if before_backward is not None:
                    before_backward(action.stage, action == self._last_backward[action.stage])
                self._backward(action, state)
            elif action.kind.is_send:
                state.send(action, self.program.peer(action))
            else:
                state.receive(action, self.program.peer(action))
        state.finish()

    def _forward(self, action: Action, forward: ForwardStep, state: _RunState) -> None:
        required = action.requires(self.num_stages)
        stage_input = None if required is None else state.take(required)
        if stage_input is not None and torch.is_grad_enabled():
            stage_input.requires_grad_()
        output = forward(action.stage, stage_input, action.microbatch)
        is_last = action.stage == self.num_stages - 1
        if torch.is_grad_enabled():
            # The backward pass of an inner stage needs the graph behind its output, not the output.
            root = output if is_last else get_gradient_edge(output)
            state.live[action.stage, action.microbatch] = (stage_input, root)
        if not is_last:
            assert action.produces is not None
            state.values[action.produces] = output.detach()

    def _backward(self, action: Action, state: _RunState) -> None:
        stage_input, root = state.live.pop((action.stage, action.microbatch))
        required = action.requires(self.num_stages)
        gradient = state.take(required) if required is not None and required.is_gradient else None
        torch.autograd.backward(root, gradient)
        if stage_input is not None:
            assert stage_input.grad is not None and action.produces is not None
            state.values[action.produces] = stage_input.grad


@dataclass
class _RunState:
    """Tensors between computations: values waiting to be used or sent, and what backward passes still need."""

    wire: Wire
    values: dict[Value, Tensor] = field(default_factory=dict)
    live: dict[tuple[int, int], tuple[Tensor | None, Tensor | GradientEdge]] = field(default_factory=dict)
    arriving: dict[Value, tuple[Tensor, dist.Work]] = field(default_factory=dict)
    leaving: deque[tuple[Tensor, dist.Work]] = field(default_factory=deque)

    def take(self, value: Value) -> Tensor:
        """The tensor of `value`, once it has arrived if it comes from another rank."""
        if value in self.values:
            return self.values.pop(value)
        tensor, work = self.arriving.pop(value)
        work.wait()
        return tensor

    def send(self, action: Action, peer: int) -> None:
        tensor = self.values.pop(action.carries).contiguous()
        self.leaving.append((tensor, self.wire.send(tensor, peer)))
        if len(self.leaving) > MAX_LEAVING:
            _, work = self.leaving.popleft()
            work.wait()

    def receive(self, action: Action, peer: int) -> None:
        self.arriving[action.carries] = self.wire.receive(peer, action.microbatch)

    def finish(self) -> None:
        for _, work in self.leaving:
            work.wait()
        assert not self.values and not self.live and not self.arriving, "a program left tensors behind"
