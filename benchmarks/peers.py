"""The other sides: a hand-written training loop, and torch's own parallelism as its documentation uses it.

Where the peer is a way to parallelise, it parallelises *our* model, so that a ratio speaks of the parallelism alone.
Tensor parallelism needs a model of `nn.Linear`s, and takes the hand-written one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.llama import Llama
from benchmarks.ours import Step, our_stage
from benchmarks.workload import NUM_MICROBATCHES, Size, fused_adamw, global_batch
from megatron.core.layout import ParallelLayout
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.topology import Axis, Topology

Loss = Callable[[Tensor, Tensor], Tensor]
"""(tokens [b, s], labels [b, s]) -> mean loss."""


def hand_written(size: Size) -> Step:
    """One process: the plain loop over micro-batches."""
    model = Llama(size, fused=True)
    return _accumulating(model, lambda x, y: _cross_entropy(model(x), y), _microbatches(size))


def distributed_data_parallel(size: Size) -> Step:
    """DDP on our model; gradients are reduced with the last micro-batch."""
    Topology.create(ParallelLayout(dp=2))
    module = DistributedDataParallel(_WithLoss(our_stage(size)), gradient_as_bucket_view=True)
    return _accumulating(module, module, _microbatches(size)[dist.get_rank() :: 2], accumulate=module.no_sync)


def plain_fully_shard(size: Size) -> Step:
    """fully_shard on our model with its defaults, one unit a layer and one for the rest."""
    mesh = Topology.create(ParallelLayout(dp=2)).data_mesh
    stage = our_stage(size)
    module = _WithLoss(stage)
    for layer in stage.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return _accumulating(module, module, _microbatches(size)[dist.get_rank() :: 2])


def torch_pipelining(size: Size) -> Step:
    """torch.distributed.pipelining, 1F1B, over our stages."""
    Topology.create(ParallelLayout(pp=2))
    number = dist.get_rank()
    module = _TakesHiddenStates(our_stage(size, number=number, num_stages=2), size.seq_length)
    stage = PipelineStage(module, number, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, NUM_MICROBATCHES, loss_fn=_our_loss)
    optimizer = fused_adamw(module)
    tokens, labels = (x.flatten(0, 1) for x in global_batch(size))

    def step() -> float | None:
        losses: list[Tensor] = []
        if number == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=labels, losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if losses else None

    return step


def dtensor_tensor_parallel(size: Size) -> Step:
    """parallelize_module with sequence parallelism and a loss over sharded logits, which is its faster plan on gloo."""
    mesh = Topology.create(ParallelLayout(dp=2)).data_mesh  # any mesh of the two ranks
    assert mesh is not None
    model = Llama(size, fused=False)
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    layer_plan = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        **{f"attention.project.{name}": ColwiseParallel() for name in ("q", "k", "v")},
        "attention.output": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        **{f"mlp.project.{name}": ColwiseParallel() for name in ("gate", "up")},
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(model, mesh, ends)
    for layer in model.layers:
        parallelize_module(layer, mesh, layer_plan)

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(model(tokens), labels)

    return _accumulating(model, loss, _microbatches(size), around=loss_parallel, value_of=_whole)


def _accumulating(
    module: nn.Module,
    loss_of: Loss,
    microbatches: list[tuple[Tensor, Tensor]],
    *,
    accumulate: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    value_of: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Step:
    """Gradient accumulation and fused AdamW; `accumulate` is entered for all micro-batches but the last."""
    optimizer = fused_adamw(module)
    last = len(microbatches) - 1

    def step() -> float:
        total = torch.zeros(())
        for i, (tokens, labels) in enumerate(microbatches):
            with around(), accumulate() if i < last else contextlib.nullcontext():
                loss = loss_of(tokens, labels) / len(microbatches)
                loss.backward()
            total += value_of(loss)
        optimizer.step()
        optimizer.zero_grad()
        if len(microbatches) < NUM_MICROBATCHES:  # the data ranks have the others
            dist.all_reduce(total)
            total /= NUM_MICROBATCHES // len(microbatches)
        return total.item()

    return step


class _WithLoss(nn.Module):
    """Our whole model and its loss in one module, which DDP and fully_shard wrap."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return _our_loss(self.stage(tokens, tokens.shape[1]), labels)


class _TakesHiddenStates(nn.Module):
    """A stage whose only argument is what the stage before it returned."""

    def __init__(self, stage: nn.Module, seq_length: int):
        super().__init__()
        self.stage, self.seq_length = stage, seq_length

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x, self.seq_length)


def _our_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits: [s, b, v], labels: [b, s]."""
    return vocab_parallel_cross_entropy(logits, labels.t(), Axis("tp"), vocab_size=logits.shape[-1]).mean()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _microbatches(size: Size) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*global_batch(size), strict=True))


def _whole(loss: Tensor) -> Tensor:
    """The plain value of a loss over sharded logits."""
    return loss.detach().full_tensor()  # type: ignore[attr-defined]
