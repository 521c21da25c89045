"""The executor computes what the stages compute in a row, and keeps no more than its schedule says."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from distributed import run_distributed
from megatron.core.layout import ParallelLayout
from megatron.core.pipeline import build_schedule, executor, lower
from megatron.core.pipeline.executor import PipelineExecutor
from megatron.core.pipeline.p2p import Wire
from megatron.core.topology import Topology

WIDTH = 4


def weight(stage: int) -> Tensor:
    generator = torch.Generator().manual_seed(stage)
    return torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def sample(microbatch: int) -> Tensor:
    return torch.arange(WIDTH, dtype=torch.float64).add(microbatch).unsqueeze(0)


def stage_forward(x: Tensor, stage_weight: Tensor, is_last: bool) -> Tensor:
    y = (x @ stage_weight).tanh()
    return y.sum() if is_last else y


def gradients_of_run(name: str, num_microbatches: int, num_chunks: int) -> dict[int, Tensor]:
    topology = Topology.create(ParallelLayout(pp=torch.distributed.get_world_size()))
    program = lower(build_schedule(name, topology.pp.size, num_microbatches, num_chunks=num_chunks))
    last = program.placement.num_stages - 1
    weights = {stage: weight(stage) for stage in program.placement.stages_of(topology.pp.rank)}

    def forward(stage: int, x: Tensor | None, microbatch: int) -> Tensor:
        return stage_forward(sample(microbatch) if x is None else x, weights[stage], stage == last)

    wire = Wire(topology.pp, [(1, WIDTH)] * num_microbatches, torch.float64, topology.device)
    PipelineExecutor(program, topology.pp.rank).run(forward, wire)
    return {stage: stage_weight.grad for stage, stage_weight in weights.items()}


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "num_chunks"),
    [("1f1b", 1, 3, 1), ("1f1b", 4, 2, 1), ("1f1b", 3, 7, 1), ("gpipe", 3, 5, 1), ("interleaved", 2, 4, 3)],
)
def test_gradients_equal_those_of_the_stages_in_a_row(name, num_ranks, num_microbatches, num_chunks):
    num_stages = num_ranks * num_chunks
    weights = [weight(stage) for stage in range(num_stages)]
    for microbatch in range(num_microbatches):
        x = sample(microbatch)
        for stage in range(num_stages):
            x = stage_forward(x, weights[stage], stage == num_stages - 1)
        x.backward()
    for gradients in run_distributed(gradients_of_run, num_ranks, name, num_microbatches, num_chunks):
        for stage, gradient in gradients.items():
            torch.testing.assert_close(gradient, weights[stage].grad, rtol=1e-13, atol=0)


def most_outputs_alive(num_microbatches: int) -> int:
    """How many earlier outputs are alive at the start of a forward pass, at most, over one 1F1B run on this rank."""
    topology = Topology.create(ParallelLayout(pp=2))
    program = lower(build_schedule("1f1b", 2, num_microbatches))
    stage_weight = weight(topology.pp.rank)
    outputs: list[weakref.ref[Tensor]] = []
    most_alive = 0

    def forward(stage: int, x: Tensor | None, microbatch: int) -> Tensor:
        nonlocal most_alive
        gc.collect()
        most_alive = max(most_alive, sum(output() is not None for output in outputs))
        y = (sample(microbatch) if x is None else x) @ stage_weight  # a product keeps its inputs, not its output
        outputs.append(weakref.ref(y))
        return y.sum() if topology.pp.is_last else y

    wire = Wire(topology.pp, [(1, WIDTH)] * num_microbatches, torch.float64, topology.device)
    PipelineExecutor(program, topology.pp.rank).run(forward, wire)
    return most_alive


def test_outputs_are_let_go_at_once_although_their_backward_passes_are_to_come():
    """Under 1F1B the first of two ranks has two micro-batches in flight; what was sent shares memory, not objects."""
    assert run_distributed(most_outputs_alive, 2, 12) == [0, 0]


def most_leaving(num_microbatches: int) -> int:
    topology = Topology.create(ParallelLayout(pp=2))
    program = lower(build_schedule("gpipe", 2, num_microbatches))
    lengths = []
    original = executor._RunState.send

    def counted(state, action, peer):
        original(state, action, peer)
        lengths.append(len(state.leaving))

    executor._RunState.send = counted
    wire = Wire(topology.pp, [(1, WIDTH)] * num_microbatches, torch.float64, topology.device)

    def forward(stage: int, x: Tensor | None, microbatch: int) -> Tensor:
        y = (sample(microbatch) if x is None else x) @ weight(stage)
        return y.sum() if topology.pp.is_last else y

    PipelineExecutor(program, topology.pp.rank).run(forward, wire)
    return max(lengths)


def test_few_sends_are_under_way_at_once():
    assert run_distributed(most_leaving, 2, 16) == [executor.MAX_LEAVING] * 2
