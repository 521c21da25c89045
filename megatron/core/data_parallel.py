"""Data parallelism and ZeRO behind one small interface. The only file that knows DTensor and FSDP.

    ZeRO stage    sharded over the data axis             engine
    0             nothing                                 Replication
    1             optimizer state                         FSDP2, gradients reduced with the last micro-batch
    2             + gradients                             FSDP2, gradients reduced with every micro-batch
    3             + weights                               FSDP2, weights gathered for every pass of a layer

Everybody else sees `Shard`s: plain local tensors that are filled from a checkpoint, carry a gradient
after `finish_gradients`, and are updated by the optimizer. Gradients are sums over micro-batches and data
ranks, never means, in the precision the parameters were built in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.core.replication import Replication
from megatron.core.sharding import Region, ShardSpec
from megatron.core.topology import Axis, Topology

ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class DataParallelConfig:
    """`compute_dtype` is what the stages compute in, None for the dtype their parameters were built in.

    Another dtype than that one makes the parameters as built the masters, and casts copies of them.
    `bucket_bytes` bounds what one all-reduce of stage 0 carries (a larger parameter travels alone).
    """

    zero_stage: ZeroStage = 0
    compute_dtype: torch.dtype | None = None
    bucket_bytes: int = 16 * 2**20


@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank owns and updates of one stored parameter: `tensor` is rows-shard `index` of `count`.

    `name` is the parameter's path in its stage behind the stage's index on this rank ("0.layers.1.mlp.up.weight").
    A frozen parameter has `trainable` False and never a gradient.
    """

    name: str
    spec: ShardSpec
    tensor: Tensor
    index: int
    count: int
    trainable: bool

    @property
    def gradient(self) -> Tensor:
        assert self.tensor.grad is not None, f"{self.name} has no gradient: finish_gradients comes first"
        return self.tensor.grad

    def regions(self, tp: Axis) -> list[Region]:
        return self.spec.regions(tp.rank, tp.size, self.index, self.count)


class DataParallel:
    """Makes the stages of this rank data parallel, in place, and hands out their shards.

    `units[i]` are the submodules of stage i whose weights are gathered together (its layers); the rest of
    the stage is gathered with the stage. Parameters on the meta device are allocated here, zero-filled:
    a sharded layer is whole only while it is cut. A step is then

        prepare_backward(i, is_last=...) before each backward pass of stage i -> finish_gradients
        -> update each shard.tensor -> refresh -> zero_gradients
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        specs: Sequence[Mapping[str, ShardSpec]],
        units: Sequence[Sequence[nn.Module]],
        topology: Topology,
        config: DataParallelConfig,
    ):
        self._engine: _Engine
        if config.zero_stage == 0:
            for stage in stages:
                materialize(stage, topology.device)
            parameters = [list(stage.parameters()) for stage in stages]
            self._engine = Replication(
                parameters, topology.dp, compute_dtype=config.compute_dtype, bucket_bytes=config.bucket_bytes
            )
            index, count = 0, 1
        else:
            self._engine = _FullySharded(stages, units, topology, config)
            index, count = topology.dp.rank, topology.dp.size
        self.shards: tuple[Shard, ...] = tuple(
            Shard(f"{i}.{name}", specs[i][name], master, index, count, trainable=parameter.requires_grad)
            for i, (stage, masters) in enumerate(zip(stages, self._engine.masters, strict=True))
            for (name, parameter), master in zip(stage.named_parameters(), masters, strict=True)
        )

    def prepare_backward(self, stage_index: int, *, is_last: bool) -> None:
        """`is_last` says that the coming backward pass is this stage's last one before `finish_gradients`."""
        self._engine.prepare_backward(stage_index, is_last=is_last)

    def finish_gradients(self) -> None:
        """Leaves in every trainable shard's `gradient` the sum over micro-batches and data ranks.

        It is zero for a parameter that no micro-batch used, so that the same parameters are updated in
        every layout.
        """
        self._engine.finish_gradients()
        for shard in self.shards:
            if shard.trainable and shard.tensor.grad is None:
                shard.tensor.grad = torch.zeros_like(shard.tensor)

    def zero_gradients(self) -> None:
        for shard in self.shards:
            shard.tensor.grad = None

    def refresh(self) -> None:
        """Makes the stages compute with what the shards hold now. Call it whenever shards were filled or updated."""
        self._engine.refresh()


def materialize(module: nn.Module, device: torch.device) -> None:
    """Allocates the module's meta parameters, filled with zeros, which is what padding has to hold.

    Unlike nn.Module.to_empty it keeps a parameter that several modules share one parameter.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        assert not any(buffer.is_meta for buffer in owner.buffers(recurse=False)), "nobody could fill a meta buffer"
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if parameter not in made:
                    zeros = torch.zeros_like(parameter, device=device)
                    made[parameter] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
                setattr(owner, name, made[parameter])


class _Engine(Protocol):
    """`masters[i][j]` is the plain tensor to update for parameter j of stage i."""

    @property
    def masters(self) -> list[list[Tensor]]: ...
    def prepare_backward(self, stage_index: int, *, is_last: bool) -> None: ...
    def finish_gradients(self) -> None: ...
    def refresh(self) -> None: ...


class _FullySharded:
    """FSDP2 over the data axis alone, also when that axis has one rank."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        units: Sequence[Sequence[nn.Module]],
        topology: Topology,
        config: DataParallelConfig,
    ):
        assert topology.data_mesh is not None, "ZeRO needs a process group, also on one rank"
        self._stages = [cast(FSDPModule, stage) for stage in stages]
        self._zero_stage = config.zero_stage
        self._modules: list[FSDPModule] = []
        for stage, stage_units in zip(stages, units, strict=True):
            # One stage alone begins its backward pass at once with what it needed last, its last unit and its own
            # weights; with several micro-batches in flight they would stay gathered for nothing.
            needed_at_once = (stage_units[-1], stage) if topology.pp.size == 1 else ()
            for module in (*stage_units, stage):
                reshard = config.zero_stage == 3 and not any(module is other for other in needed_at_once)
                materialize(module, topology.device)
                self._modules.append(_shard(module, topology.data_mesh, reshard, config.compute_dtype))
            if config.zero_stage < 3:
                cast(FSDPModule, stage).set_reshard_after_backward(False)
            elif stage_units:
                _prefetch_backwards([cast(FSDPModule, module) for module in (*stage_units, stage)])
        self._parameters = [list(stage.parameters()) for stage in stages]
        self._locals = [[_local(parameter) for parameter in stage] for stage in self._parameters]

    @property
    def masters(self) -> list[list[Tensor]]:
        return self._locals

    def prepare_backward(self, stage_index: int, *, is_last: bool) -> None:
        self._stages[stage_index].set_is_last_backward(is_last)
        if self._zero_stage == 1:
            self._stages[stage_index].set_requires_gradient_sync(is_last)

    def finish_gradients(self) -> None:
        for stage, stage_locals in zip(self._parameters, self._locals, strict=True):
            for parameter, local in zip(stage, stage_locals, strict=True):
                if parameter.grad is not None:
                    local.grad = _local(parameter.grad)
                    parameter.grad = None

    def refresh(self) -> None:
        for module in self._modules:
            module.reshard()


def _shard(module: nn.Module, mesh: DeviceMesh, reshard: bool, compute_dtype: torch.dtype | None) -> FSDPModule:
    master_dtype = next((p.dtype for p in module.parameters() if p.requires_grad), None)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=master_dtype, cast_forward_inputs=False)
    sharded = fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    # Together these make the reduction a plain sum; gloo knows no other for a factor of 1.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu":
        sharded.set_custom_reduce_scatter(cast(Any, _AllReduceAndSlice()))
    return sharded


def _prefetch_backwards(modules: Sequence[FSDPModule]) -> None:
    """Lets each module's backward pass gather the weights of the one before it.

    FSDP's own choice is the module that ran before this one, which is wrong for micro-batches in flight:
    before a stage's first layer ran the last layer of the previous micro-batch.
    """
    for earlier, later in pairwise(modules):
        later.set_modules_to_backward_prefetch([earlier])
    # Its own weights are there already, so this gathers nothing; an empty list would mean FSDP's choice.
    modules[0].set_modules_to_backward_prefetch([modules[0]])


class _AllReduceAndSlice:
    """FSDP's reduce-scatter on gloo, whose own is slower than its all-reduce of the same tensor at every size."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        assert not async_op
        dist.all_reduce(input_tensor, op=op, group=group)
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows as a plain tensor that shares the memory."""
    return cast(DTensor, tensor.detach()).to_local()
