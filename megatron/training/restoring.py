"""Fills a run from a checkpoint of any layout, and from an older one where the data turns out to be damaged."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron.checkpoint.agreement import gather_to_all, on_every_rank
from megatron.checkpoint.manager import check_architecture, load
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.source import MODEL, LocalTensor, Source
from megatron.checkpoint.validity import newest_valid
from megatron.config import RunConfig
from megatron.core.data_parallel import DataParallel
from megatron.core.topology import Axis, Topology
from megatron.errors import CheckpointError, DamagedCheckpointError
from megatron.optimizer.optimizers import Optimizer
from megatron.training.checkpointing import resume_point


def restore(
    run: RunConfig, topology: Topology, data_parallel: DataParallel, optimizer: Optimizer, source: Source
) -> Source:
    """Fills masters, and the optimizer's state where the run continues; returns the source that it came from.

    That is `source`, or the newest valid checkpoint before it if the data of `source` is found damaged and the user
    named no iteration. Every rank calls it together, and all take the same one.
    """
    damaged: dict[Path, str] = {}
    while True:
        _check_alike(source, topology.world)
        try:
            _fill(run, topology, data_parallel, optimizer, source)
            return source
        except DamagedCheckpointError as error:
            if not _is_latest(run, source):
                raise
            damaged[source.path] = str(error)
        _clear(optimizer)
        source = on_every_rank(topology.world, partial(newest_valid, source.path.parent, damaged))
        check_architecture(source.path, source.model_config(), run.model)


def _fill(
    run: RunConfig, topology: Topology, data_parallel: DataParallel, optimizer: Optimizer, source: Source
) -> None:
    start, tp = resume_point(run, source), topology.tp
    weights = [LocalTensor(MODEL, shard.regions(tp), shard.tensor.detach()) for shard in data_parallel.shards]
    load(source, weights, topology.world)
    data_parallel.refresh()
    if start.iteration == 0 or not run.checkpoint.load_optim:
        return
    states = [
        LocalTensor(f"optimizer.{name}", shard.regions(tp), tensor)
        for shard in data_parallel.shards
        for name, tensor in optimizer.state.get(shard.name, {}).items()
    ]
    load(source, states, topology.world)
    state = source.state()
    assert state is not None
    num_steps = state.optimizer["num_steps"]
    assert isinstance(num_steps, int)
    optimizer.num_steps = num_steps


def _clear(optimizer: Optimizer) -> None:
    """What a load that failed half-way may have left: an older checkpoint may have no state to put over it."""
    for tensors in optimizer.state.values():
        for tensor in tensors.values():
            tensor.zero_()
    optimizer.num_steps = 0


def _is_latest(run: RunConfig, source: Source) -> bool:
    """Whether the source was chosen as the latest checkpoint of a run's folder, and not named by the user."""
    named_by_user = run.checkpoint.load_iters is not None or source.path == Path(run.checkpoint.load or "")
    return isinstance(source, NativeSource) and not named_by_user


def _check_alike(source: Source, world: Axis) -> None:
    """Each process has chosen by what it sees, and a host may not see all."""
    chosen = gather_to_all(world, source.path.name)
    if len(set(chosen)) > 1:
        others = next(rank for rank, name in enumerate(chosen) if name != chosen[0])
        raise CheckpointError(
            f"the processes see different checkpoints in {source.path.parent}: rank 0 {chosen[0]}, rank {others} "
            f"{chosen[others]}; name one with --load_iters, or wait until all hosts see the same files."
        )
