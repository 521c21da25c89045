"""What a run saves and resumes from: its shards and optimizer state as rectangles, and the few numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from megatron.checkpoint.manager import load, save
from megatron.checkpoint.source import JSON, MODEL, CheckpointInfo, LocalTensor, RunState, Source, TokenizerIdentity
from megatron.config import RunConfig
from megatron.core.data_parallel import DataParallel, Shard
from megatron.core.topology import Topology
from megatron.errors import CheckpointError
from megatron.optimizer.optimizers import Optimizer


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
    """Saves the run's state, and restores it from any source, whatever layout wrote it."""

    def __init__(
        self,
        run: RunConfig,
        topology: Topology,
        data_parallel: DataParallel,
        optimizer: Optimizer,
        *,
        tokenizer: TokenizerIdentity,
        num_samples: Mapping[str, int],
        carried: Mapping[str, JSON],
    ):
        self.run, self.topology, self.data_parallel, self.optimizer = run, topology, data_parallel, optimizer
        self.tokenizer, self.num_samples, self.carried = tokenizer, num_samples, carried

    def save(self, progress: Progress) -> Path:
        """Writes a checkpoint and returns its folder when it is complete. Every rank calls it together."""
        assert self.run.checkpoint.save is not None
        return save(Path(self.run.checkpoint.save), self._info(progress), self._outgoing(), self.topology.world)

    def load_weights(self, source: Source) -> None:
        """Fills the masters of this rank from `source`."""
        load(source, [self._whole(MODEL, shard, shard.tensor.detach()) for shard in self._shards], self.topology.world)
        self.data_parallel.refresh()

    def load_optimizer(self, source: Source) -> None:
        """Fills the optimizer's state from `source`, which `resume_point` has found to have it."""
        state = source.state()
        assert state is not None
        tensors = [
            self._whole(f"optimizer.{name}", shard, tensor)
            for shard in self._shards
            for name, tensor in self.optimizer.state.get(shard.name, {}).items()
        ]
        load(source, tensors, self.topology.world)
        num_steps = state.optimizer["num_steps"]
        assert isinstance(num_steps, int)
        self.optimizer.num_steps = num_steps

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
            data={"num_samples": dict(self.num_samples)},
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
