"""Every ZeRO stage on any number of data ranks trains as one process that sees all micro-batches.

Sizes: 11 tokens, hidden 6, ffn 7. On four data ranks six rows leave the last rank's shard empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distributed import run_distributed
from megatron.core.collectives import all_reduce_async
from megatron.core.data_parallel import DataParallel, DataParallelConfig, Shard, ZeroStage
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Block, ShardSpec, fill
from megatron.core.topology import Axis, Topology
from megatron.optimizer.config import OptimizerConfig
from megatron.optimizer.optimizers import Optimizer

VOCAB, HIDDEN, FFN = 11, 6, 7
NUM_STEPS, NUM_MICROBATCHES = 3, 4
LR = 1e-2
ADAM = OptimizerConfig(lr=LR, weight_decay=0.1, adam_beta2=0.95)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(HIDDEN))
        self.up = nn.Parameter(torch.empty(FFN, HIDDEN))
        self.up_bias = nn.Parameter(torch.empty(FFN))
        self.down = nn.Parameter(torch.empty(HIDDEN, FFN))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(x * self.norm @ self.up.t() + self.up_bias) @ self.down.t()


class TinyStage(nn.Module):
    """tokens [n, 5] -> logits [n, 5, 11] when it is first and last. `spare` is never used.

    A stage in the middle has no parameters outside its layers.
    """

    def __init__(self, num_layers: int = 2, *, first: bool = True, last: bool = True, recompute: bool = False):
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Parameter(torch.empty(VOCAB, HIDDEN)) if first else None
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.spare = nn.Parameter(torch.empty(3, HIDDEN)) if first or last else None
        # Both ends on one stage share one parameter.
        self.head = (self.embedding if first else nn.Parameter(torch.empty(VOCAB, HIDDEN))) if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = F.embedding(x, self.embedding)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x if self.head is None else x @ self.head.t()


def build(kind: str, device: str) -> list[TinyStage]:
    with torch.device(device):
        if kind == "two stages":
            return [TinyStage(last=False), TinyStage(first=False)]
        if kind == "three stages":
            return [TinyStage(1, last=False), TinyStage(first=False, last=False), TinyStage(1, first=False)]
        return [TinyStage(recompute=kind == "recompute")]


def named(stages: list[TinyStage]) -> Iterator[tuple[str, nn.Parameter]]:
    for i, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            yield f"{i}.{name}", parameter


def initial(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) / 2
        for name, p in named(build(kind, "meta"))
    }


def batch(step: int, microbatch: int) -> tuple[Tensor, Tensor]:
    """microbatch counts over all data ranks."""
    generator = torch.Generator().manual_seed(1000 * step + microbatch)
    tokens = torch.randint(VOCAB, (3, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def actions(num_stages: int) -> list[tuple[str, int, int]]:
    """Stage 0 is always one forward pass ahead, so that two micro-batches are in flight as in 1F1B."""
    sequence = [("F", 0, 0)]
    for m in range(NUM_MICROBATCHES):
        if m + 1 < NUM_MICROBATCHES:
            sequence.append(("F", 0, m + 1))
        sequence += [("F", stage, m) for stage in range(1, num_stages)]
        sequence += [("B", stage, m) for stage in reversed(range(num_stages))]
    return sequence


def run_step(stages: list[TinyStage], parallel: DataParallel, step: int, first_microbatch: int) -> float:
    """All micro-batches of this rank as a pipeline executor would run them; the sum of losses."""
    last, total = len(stages) - 1, 0.0
    outputs: dict[tuple[int, int], Tensor] = {}
    received: dict[tuple[int, int], Tensor] = {}
    for kind, stage, m in actions(len(stages)):
        tokens, targets = batch(step, first_microbatch + m)
        if kind == "F":
            if stage > 0:
                received[stage, m] = outputs[stage - 1, m].detach().requires_grad_()
            outputs[stage, m] = stages[stage](received[stage, m] if stage > 0 else tokens)
            continue
        parallel.prepare_backward(stage, is_last=m == NUM_MICROBATCHES - 1)
        if stage == last:
            loss = loss_sum(outputs.pop((stage, m)), targets)
            loss.backward()
            total += loss.item()
        else:
            outputs.pop((stage, m)).backward(received.pop((stage + 1, m)).grad)
    return total


def evaluate(stages: list[TinyStage]) -> float:
    tokens, targets = batch(step=99, microbatch=0)
    with torch.no_grad():
        x = tokens
        for stage in stages:
            x = stage(x)
        return loss_sum(x, targets).item()


def make_parallel(
    kind: str, topology: Topology, zero_stage: ZeroStage, dtype: torch.dtype, compute_dtype: torch.dtype, device: str
) -> tuple[list[TinyStage], DataParallel]:
    stages = [stage.to(dtype) for stage in build(kind, device)]
    specs = [
        {name: ShardSpec((Block(f"{i}.{name}", tuple(p.shape)),)) for name, p in stage.named_parameters()}
        for i, stage in enumerate(stages)
    ]
    # A bucket of 300 bytes holds about one layer, so that several are under way.
    config = DataParallelConfig(zero_stage, compute_dtype, bucket_bytes=300)
    parallel = DataParallel(stages, specs, [list(stage.layers) for stage in stages], topology, config)
    weights = initial(kind, dtype)
    for shard in parallel.shards:
        fill(shard.tensor, shard.regions(topology.tp), lambda region: weights[region.name][region.global_slices])
    parallel.refresh()
    return stages, parallel


Trace = list[dict[str, Any]]


def train(
    kind: str,
    topology: Topology,
    zero_stage: ZeroStage,
    compute_dtype: torch.dtype = torch.float64,
    device: str = "meta",
) -> tuple[Trace, list[Shard]]:
    """Per step: the loss before, this rank's gradients and weights after, and the evaluation loss after."""
    dtype = torch.float32 if compute_dtype == torch.bfloat16 else compute_dtype
    stages, parallel = make_parallel(kind, topology, zero_stage, dtype, compute_dtype, device)
    optimizer = Optimizer(ADAM, parallel.shards)
    trace: Trace = []
    for step in range(NUM_STEPS):
        loss = run_step(stages, parallel, step, topology.dp.rank * NUM_MICROBATCHES)
        parallel.finish_gradients()
        gradients = {shard.name: shard.gradient.clone() for shard in parallel.shards}
        optimizer.step(LR)
        parallel.refresh()
        parallel.zero_gradients()
        weights = {shard.name: shard.tensor.clone() for shard in parallel.shards}
        evaluation = [evaluate(stages), evaluate(stages)]
        trace.append({"loss": loss, "gradients": gradients, "weights": weights, "evaluation": evaluation})
    return trace, list(parallel.shards)


def train_serially(kind: str, num_microbatches: int) -> Trace:
    """The same in one process with nothing of ours: plain modules, one backward pass, torch's unfused AdamW."""
    stages = [stage.double() for stage in build(kind, "cpu")]
    weights = initial(kind, torch.float64)
    for name, parameter in named(stages):
        parameter.data.copy_(weights[name])
    parameters = dict(named(stages))
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": ADAM.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    trace: Trace = []
    for step in range(NUM_STEPS):
        losses = []
        for m in range(num_microbatches):
            x, targets = batch(step, m)
            for stage in stages:
                x = stage(x)
            losses.append(loss_sum(x, targets))
        torch.stack(losses).sum().backward()
        for name, parameter in parameters.items():
            if name.endswith("spare"):
                parameter.grad = torch.zeros_like(parameter)
        gradients = {name: p.grad for name, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
        trace.append(
            {
                "loss": [loss.item() for loss in losses],
                "gradients": gradients,
                "weights": {name: p.detach().clone() for name, p in parameters.items()},
                "evaluation": evaluate(stages),
            }
        )
    return trace


def assert_equals_serial(kind: str, topology: Topology, zero_stage: ZeroStage, serial: Trace) -> None:
    trace, shards = train(kind, topology, zero_stage)
    mine = slice(topology.dp.rank * NUM_MICROBATCHES, (topology.dp.rank + 1) * NUM_MICROBATCHES)
    for ours, theirs in zip(trace, serial, strict=True):
        assert ours["loss"] == pytest.approx(sum(theirs["loss"][mine]), rel=1e-12)
        assert ours["evaluation"] == pytest.approx([theirs["evaluation"]] * 2, rel=1e-12)
        for what in ("gradients", "weights"):
            for shard in shards:
                for region in shard.regions(topology.tp):
                    local = ours[what][shard.name][region.local_slices]
                    torch.testing.assert_close(
                        local,
                        theirs[what][region.name][region.global_slices],
                        rtol=1e-11,
                        atol=1e-12,
                        msg=lambda message: f"{what} of {shard.name}: {message}",  # noqa: B023 - called at once
                    )


def compare_all_zero_stages(kind: str) -> list[int]:
    """Returns the numbers of rows of this rank's shards of a parameter with six rows, for ZeRO-3."""
    world_size = torch.distributed.get_world_size()
    topology = Topology.create(ParallelLayout(dp=world_size))
    if kind != "one stage":
        # All stages run here, but as on a pipeline rank ZeRO-3 gives up the root's weights between the passes.
        topology = replace(topology, pp=Axis("pp", size=2))
    serial = train_serially(kind, NUM_MICROBATCHES * world_size)
    for zero_stage in (0, 1, 2, 3):
        assert_equals_serial(kind, topology, zero_stage, serial)
    _, parallel = make_parallel(kind, topology, 3, torch.float64, torch.float64, "cpu")
    return [len(shard.tensor) for shard in parallel.shards if shard.name.endswith("layers.1.down")]


@pytest.mark.parametrize("kind", ["one stage", "two stages", "three stages", "recompute"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_trains_as_the_serial_model(kind: str, world_size: int) -> None:
    run_distributed(compare_all_zero_stages, world_size, kind)


def test_uneven_and_empty_shards_train_as_the_serial_model() -> None:
    rows = run_distributed(compare_all_zero_stages, 4, "two stages")
    assert rows == [[2, 2], [2, 2], [2, 2], [0, 0]]  # ceil(6 / 4) rows each while there are any, in both stages


def test_no_process_group_is_needed_on_one_rank() -> None:
    assert_equals_serial("two stages", Topology.serial(), 0, train_serially("two stages", NUM_MICROBATCHES))


def test_one_rank_computes_with_the_very_tensors_it_updates_and_without_hooks() -> None:
    stages, parallel = make_parallel("one stage", Topology.serial(), 0, torch.float32, torch.float32, "cpu")
    for parameter, shard in zip(stages[0].parameters(), parallel.shards, strict=True):
        assert shard.tensor is parameter
        assert not parameter._post_accumulate_grad_hooks
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in stages[0].modules())


def test_a_shared_meta_parameter_stays_one_parameter() -> None:
    stages, _ = make_parallel("one stage", Topology.serial(), 0, torch.float32, torch.float32, "meta")
    assert stages[0].embedding is stages[0].head
    assert not any(parameter.is_meta for parameter in stages[0].parameters())


def test_a_frozen_parameter_has_a_shard_without_gradient() -> None:
    (stage,) = build("one stage", "meta")
    stage.get_parameter("spare").requires_grad_(False)
    specs = {name: ShardSpec((Block(name, tuple(p.shape)),)) for name, p in stage.named_parameters()}
    config = DataParallelConfig(compute_dtype=torch.bfloat16)
    parallel = DataParallel([stage], [specs], [[]], Topology.serial(), config)
    parallel.finish_gradients()
    by_name = {shard.name: shard for shard in parallel.shards}
    assert not by_name["0.spare"].trainable
    assert by_name["0.spare"].tensor.grad is None
    assert by_name["0.spare"].tensor.dtype == torch.bfloat16  # nothing updates it, so it needs no master
    assert by_name["0.embedding"].gradient.dtype == torch.float32


def emulate_bfloat16() -> dict[str, Tensor]:
    """fp32 masters by hand: bf16 copies compute, each micro-batch's gradient is added in fp32."""
    masters = initial("two stages", torch.float32)
    stages = [stage.bfloat16() for stage in build("two stages", "cpu")]
    groups = [
        {"params": [m for m in masters.values() if m.ndim > 1], "weight_decay": ADAM.weight_decay},
        {"params": [m for m in masters.values() if m.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(NUM_STEPS):
        for name, parameter in named(stages):
            parameter.data.copy_(masters[name])
            masters[name].grad = torch.zeros_like(masters[name])
        for m in range(NUM_MICROBATCHES):
            x, targets = batch(step, m)
            loss_sum(stages[1](stages[0](x)), targets).backward()
            for name, parameter in named(stages):
                if parameter.grad is not None:
                    total = masters[name].grad
                    assert total is not None
                    total += parameter.grad.float()
                    parameter.grad = None
        optimizer.step()
    return masters


def bfloat16_results(what: str, step: int, zero_stages: list[ZeroStage]) -> list[dict[str, Tensor]]:
    topology = Topology.create(ParallelLayout(dp=torch.distributed.get_world_size()))
    return [train("two stages", topology, stage, torch.bfloat16)[0][step][what] for stage in zero_stages]


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_bfloat16_keeps_the_same_fp32_masters_in_every_zero_stage_on_one_rank() -> None:
    (by_stage,) = run_distributed(bfloat16_results, 1, "weights", NUM_STEPS - 1, [0, 1, 2, 3])
    for weights in by_stage:
        assert_bitwise(weights, emulate_bfloat16())


def test_bfloat16_gradients_are_reduced_in_fp32_alike_whether_replicated_or_sharded() -> None:
    ranks = run_distributed(bfloat16_results, 2, "gradients", 0, [0, 1, 2, 3])
    both, stage_1, stage_2, stage_3 = (
        {name: torch.cat([rank[i][name] for rank in ranks]) for name in ranks[0][i]} for i in range(4)
    )
    replicated = {name: gradient[: len(gradient) // 2] for name, gradient in both.items()}
    assert_bitwise(stage_1, replicated)
    # Reducing every micro-batch adds in another order than reducing their sum: to fp32 rounding the same, and far
    # from bf16 rounding, which is 4e-3.
    assert_bitwise(stage_3, stage_2)
    for name, gradient in replicated.items():
        torch.testing.assert_close(stage_2[name], gradient, rtol=1e-5, atol=1e-5)


def reductions_before_and_after_finishing() -> tuple[int, int]:
    topology = Topology.create(ParallelLayout(dp=2))
    stages, parallel = make_parallel("two stages", topology, 0, torch.float64, torch.float64, "cpu")
    started: list[int] = []

    def record(flat: Tensor, axis: Axis) -> Any:
        started.append(flat.numel())
        return all_reduce_async(flat, axis)

    with mock.patch("megatron.core.replication.all_reduce_async", record):
        run_step(stages, parallel, 0, topology.dp.rank * NUM_MICROBATCHES)
        in_backward = len(started)
        parallel.finish_gradients()
    return in_backward, len(started)


def test_replicas_reduce_once_a_step_and_while_the_last_backward_pass_runs() -> None:
    # 37 float64 gradients fit into a bucket of 300 bytes: a layer makes four buckets (every matrix fills one), the
    # head one, and in that order they start. Stage 1's unused parameter comes next and lets everything behind it
    # wait for the finish: itself, stage 0's eight (the last takes the unused parameter along), the embedding.
    assert run_distributed(reductions_before_and_after_finishing, 2) == [(9, 9 + 1 + 8 + 1)] * 2


def compute_dtypes(zero_stage: ZeroStage) -> tuple[list[torch.dtype], list[torch.dtype]]:
    topology = Topology.create(ParallelLayout(dp=torch.distributed.get_world_size()))
    stages, parallel = make_parallel("one stage", topology, zero_stage, torch.float32, torch.bfloat16, "meta")
    seen: list[torch.dtype] = []
    stages[0].layers[0].register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    run_step(stages, parallel, 0, 0)
    parallel.finish_gradients()
    return seen, [shard.gradient.dtype for shard in parallel.shards]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_bfloat16_stages_compute_in_bfloat16_and_hand_out_fp32_gradients(zero_stage: ZeroStage) -> None:
    for seen, gradients in run_distributed(compute_dtypes, 2, zero_stage):
        assert set(seen) == {torch.bfloat16}
        assert set(gradients) == {torch.float32}
