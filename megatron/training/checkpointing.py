"""What a run saves: its shards and optimizer state as rectangles, and the few numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from megatron.checkpoint.agreement import gather_to_first, on_first_rank
from megatron.checkpoint.commit import check_room, sweep
from megatron.checkpoint.manager import save
from megatron.checkpoint.retention import Retention
from megatron.checkpoint.snapshot import HostBuffers, check_host_memory, snapshot_bytes
from megatron.checkpoint.source import JSON, MODEL, CheckpointInfo, LocalTensor, RunState, Source, TokenizerIdentity
from megatron.config import RunConfig
from megatron.core.data_parallel import DataParallel, Shard
from megatron.core.topology import Axis, Topology
from megatron.errors import CheckpointError
from megatron.optimizer.optimizers import Optimizer
from megatron.training.saving import Saver


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done and training samples consumed."""

    iteration: int = 0
    consumed_samples: int = 0


def resume_point(run: RunConfig, source: Source | None) -> Progress:
    """Where the run continues: at its start without a checkpoint, from bare weights, and with --finetune.

    Raises CheckpointError if the checkpoint lacks the optimizer's state that the run goes on with.
    """
    state = None if source is None else source.state()
    if source is None or state is None or state.iteration == 0 or run.checkpoint.finetune:
        return Progress()
    if run.checkpoint.load_optim:
        _check_optimizer(source.path, state, run.optimizer.optimizer)
    return Progress(state.iteration, state.consumed_samples)


class RunCheckpoints:
    """Saves the run's state: what this rank holds of it, with the few numbers beside it.

    `loaded` is the folder that the run was restored from. Every rank calls the methods together.
    """

    def __init__(
        self,
        run: RunConfig,
        topology: Topology,
        data_parallel: DataParallel,
        optimizer: Optimizer,
        *,
        tokenizer: TokenizerIdentity,
        data: Mapping[str, JSON],
        carried: Mapping[str, JSON],
        loaded: Path | None,
    ):
        self.run, self.topology, self.data_parallel, self.optimizer = run, topology, data_parallel, optimizer
        self.tokenizer, self.data, self.carried = tokenizer, data, carried
        keep_last = run.checkpoint.keep_last
        self.retention = None if keep_last is None else Retention(keep_last, loaded)

    def saver(self) -> Saver:
        """Checks that a checkpoint has room on the disk, and with --async_save its copy in memory, before training.

        The run owns its save folder already. Raises CheckpointError.
        """
        root, tensors = self._root, self._outgoing()
        needs = gather_to_first(self.topology.world, snapshot_bytes(tensors))
        on_first_rank(self.topology.world, lambda: _sweep_and_check(root, sum(needs)))
        if not self.run.checkpoint.async_save:
            return Saver(partial(self._write, self.topology.world))
        check_host_memory(tensors, self.topology.world)
        timeout = timedelta(minutes=self.run.training.distributed_timeout_minutes)
        return Saver(partial(self._write, self.topology.second_world(timeout)), HostBuffers(tensors))

    def state(self, progress: Progress) -> tuple[CheckpointInfo, list[LocalTensor]]:
        """What a checkpoint of this moment consists of. The tensors are live."""
        return self._info(progress), self._outgoing()

    def _write(self, world: Axis, info: CheckpointInfo, tensors: Sequence[LocalTensor]) -> Path:
        return save(self._root, info, tensors, world, is_owned=True, retention=self.retention)

    @property
    def _root(self) -> Path:
        assert self.run.checkpoint.save is not None
        return Path(self.run.checkpoint.save)

    @property
    def _shards(self) -> tuple[Shard, ...]:
        return self.data_parallel.shards

    def _whole(self, kind: str, shard: Shard, tensor: Tensor) -> LocalTensor:
        return LocalTensor(kind, shard.regions(self.topology.tp), tensor)

    def _outgoing(self) -> list[LocalTensor]:
        """Replicas along the data axis write disjoint rows, so that all of them share the work."""
        tensors = []
        for shard in self._shards:
            kinds = {MODEL: shard.tensor.detach()}
            if self.run.checkpoint.save_optim:
                kinds |= {
                    f"optimizer.{name}": tensor for name, tensor in self.optimizer.state.get(shard.name, {}).items()
                }
            tensors += [self._own_rows(kind, shard, tensor) for kind, tensor in kinds.items()]
        return tensors

    def _own_rows(self, kind: str, shard: Shard, tensor: Tensor) -> LocalTensor:
        dp, tp = self.topology.dp, self.topology.tp
        if shard.count > 1:
            return self._whole(kind, shard, tensor)
        per_rank = -(-tensor.shape[0] // dp.size)
        rows = tensor[dp.rank * per_rank : (dp.rank + 1) * per_rank]
        return LocalTensor(kind, shard.spec.regions(tp.rank, tp.size, dp.rank, dp.size), rows)

    def _info(self, progress: Progress) -> CheckpointInfo:
        state = RunState(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            seed=self.run.training.seed,
            optimizer=self._optimizer_facts(),
            scheduler={"iteration": progress.iteration},
            config={**self._config(), **self.carried},
            data=self.data,
        )
        return CheckpointInfo(state, self.run.model, self.run.training.model_name, self.tokenizer)

    def _config(self) -> Mapping[str, JSON]:
        """The run's configuration, its tokenizer that which lies beside the checkpoints: the original may move."""
        config = cast(dict[str, Mapping[str, JSON]], self.run.to_dict())
        if self.tokenizer.tokenizer_model:
            config["tokenizer"] = {
                **config["tokenizer"],
                "tokenizer_model": self.tokenizer.tokenizer_model,
                "vocab_file": None,
            }
        return config

    def _optimizer_facts(self) -> Mapping[str, JSON]:
        """Empty where the optimizer's state is not saved."""
        if not self.run.checkpoint.save_optim:
            return {}
        return {"name": self.run.optimizer.optimizer, "num_steps": self.optimizer.num_steps}


def _sweep_and_check(root: Path, num_bytes: int) -> None:
    sweep(root)
    check_room(root, num_bytes)


def _check_optimizer(path: Path, state: RunState, optimizer: str) -> None:
    if not state.optimizer:
        raise CheckpointError(
            f"{path} was saved without the optimizer's state, so its run cannot be continued exactly; "
            "give --no_load_optim to go on with a fresh state, or --finetune to start a new run from its weights."
        )
    if state.optimizer.get("name") != optimizer:
        raise CheckpointError(
            f"{path} holds the state of optimizer {state.optimizer.get('name')}, and --optimizer is {optimizer}; "
            "give that one, or --no_load_optim to start with a fresh state."
        )
