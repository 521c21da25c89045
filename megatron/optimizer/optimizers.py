"""AdamW and SGD on the shards of this rank.

The update rules are torch's, fused. The state is allocated at once and not with the first step, so that a
run that does not fit fails at its start, and a checkpoint fills the state in place as it fills weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron.core.data_parallel import Shard
from megatron.optimizer.config import OptimizerConfig


class Optimizer:
    """Updates every trainable shard from its gradient. `num_steps` counts the updates made so far.

    Matrices decay, vectors (biases and norm weights) do not. Every shard takes part in every step, so one
    count serves all of them.
    """

    def __init__(self, config: OptimizerConfig, shards: Sequence[Shard]):
        self._shards = [shard for shard in shards if shard.trainable]
        self._torch = _torch_optimizer(config, self._shards)
        self._num_steps = 0
        names = _state_names(config)
        for shard in self._shards:
            self._torch.state[shard.tensor] = {name: torch.zeros_like(shard.tensor) for name in names}
            if config.optimizer == "adam":
                # Counted per tensor and on the device: the fused kernel increments it.
                self._torch.state[shard.tensor]["step"] = torch.zeros(
                    (), dtype=torch.float32, device=shard.tensor.device
                )
        self._state = {
            shard.name: {name: self._torch.state[shard.tensor][name] for name in names} for shard in self._shards
        }

    @property
    def num_steps(self) -> int:
        return self._num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int) -> None:
        self._num_steps = num_steps
        for state in self._torch.state.values():
            if "step" in state:
                state["step"].fill_(num_steps)

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Shard name -> state name ("exp_avg", "exp_avg_sq"; "momentum_buffer") -> tensor shaped as the shard.

        These are the live tensors: a checkpoint is loaded by filling them and setting `num_steps`.
        """
        return self._state

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`. Every trainable shard must have its gradient."""
        assert all(shard.tensor.grad is not None for shard in self._shards), "finish_gradients comes first"
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
        self._num_steps += 1


def _torch_optimizer(config: OptimizerConfig, shards: Sequence[Shard]) -> torch.optim.Optimizer:
    matrices = [shard.tensor for shard in shards if shard.tensor.ndim > 1]
    vectors = [shard.tensor for shard in shards if shard.tensor.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.sgd_momentum, fused=True)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


def _state_names(config: OptimizerConfig) -> tuple[str, ...]:
    if config.optimizer == "adam":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.sgd_momentum else ()
