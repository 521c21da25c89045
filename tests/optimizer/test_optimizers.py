"""The update rules against their formulas, and the state as a checkpoint sees it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.core.data_parallel import Shard
from megatron.core.sharding import Block, ShardSpec
from megatron.optimizer.config import OptimizerConfig
from megatron.optimizer.optimizers import Optimizer

ADAM = OptimizerConfig(lr=1.0, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8)
SGD = OptimizerConfig(optimizer="sgd", lr=1.0, weight_decay=0.1, sgd_momentum=0.9)


def make_shard(name: str, tensor: Tensor, *, trainable: bool = True) -> Shard:
    return Shard(name, ShardSpec((Block(name, tuple(tensor.shape)),)), tensor, index=0, count=1, trainable=trainable)


def make_shards(dtype: torch.dtype = torch.float64) -> list[Shard]:
    generator = torch.Generator().manual_seed(0)
    return [
        make_shard("matrix", torch.randn(4, 3, generator=generator, dtype=dtype)),
        make_shard("vector", torch.randn(5, generator=generator, dtype=dtype)),
        make_shard("empty", torch.empty(0, 3, dtype=dtype)),
    ]


def set_gradients(shards: list[Shard], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for shard in shards:
        shard.tensor.grad = torch.randn(shard.tensor.shape, generator=generator, dtype=shard.tensor.dtype)


def test_adamw_follows_its_formula_and_decays_matrices_only() -> None:
    # Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2 with the schedule inside the learning rate.
    shards = make_shards()
    optimizer = Optimizer(ADAM, shards)
    expected = {shard.name: shard.tensor.clone() for shard in shards}
    mean = {name: torch.zeros_like(w) for name, w in expected.items()}
    square = {name: torch.zeros_like(w) for name, w in expected.items()}
    for step, lr in enumerate((1e-2, 2e-2, 5e-3), start=1):
        set_gradients(shards, step)
        optimizer.step(lr)
        for shard in shards:
            gradient, name = shard.gradient, shard.name
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            root = (square[name] / (1 - 0.95**step)).sqrt() + 1e-8
            decay = 0.1 if name == "matrix" else 0.0
            expected[name] = expected[name] * (1 - lr * decay) - lr * mean[name] / (1 - 0.9**step) / root
    for shard in shards:
        torch.testing.assert_close(shard.tensor, expected[shard.name], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(optimizer.state[shard.name]["exp_avg"], mean[shard.name], rtol=1e-13, atol=0)
        torch.testing.assert_close(optimizer.state[shard.name]["exp_avg_sq"], square[shard.name], rtol=1e-13, atol=0)


def test_sgd_follows_its_formula_and_decays_matrices_only() -> None:
    shards = make_shards()
    optimizer = Optimizer(SGD, shards)
    expected = {shard.name: shard.tensor.clone() for shard in shards}
    momentum = {name: torch.zeros_like(w) for name, w in expected.items()}
    for step, lr in enumerate((1e-2, 2e-2), start=1):
        set_gradients(shards, step)
        optimizer.step(lr)
        for shard in shards:
            decay = 0.1 if shard.name == "matrix" else 0.0
            gradient = shard.gradient + decay * expected[shard.name]
            momentum[shard.name] = 0.9 * momentum[shard.name] + gradient
            expected[shard.name] = expected[shard.name] - lr * momentum[shard.name]
    for shard in shards:
        torch.testing.assert_close(shard.tensor, expected[shard.name], rtol=1e-13, atol=1e-15)


def test_sgd_without_momentum_keeps_no_state() -> None:
    optimizer = Optimizer(OptimizerConfig(optimizer="sgd", lr=1.0, sgd_momentum=0.0), make_shards())
    assert all(not state for state in optimizer.state.values())


@pytest.mark.parametrize("config", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filling_weights_state_and_step_count_continues_bitwise(config: OptimizerConfig, dtype: torch.dtype) -> None:
    shards, restored_shards = make_shards(dtype), make_shards(dtype)
    optimizer, restored = Optimizer(config, shards), Optimizer(config, restored_shards)
    for step in (1, 2, 3):
        if step == 3:
            for source, target in zip(shards, restored_shards, strict=True):
                target.tensor.copy_(source.tensor)
                for name, tensor in optimizer.state[source.name].items():
                    restored.state[target.name][name].copy_(tensor)
            restored.num_steps = optimizer.num_steps
            set_gradients(restored_shards, step)
            restored.step(1e-2)
        set_gradients(shards, step)
        optimizer.step(1e-2)
    assert restored.num_steps == optimizer.num_steps == 3
    for source, target in zip(shards, restored_shards, strict=True):
        assert torch.equal(source.tensor, target.tensor)


def test_state_has_the_shards_shape_and_precision_before_the_first_step() -> None:
    shards = make_shards(torch.float64)
    for name, state in Optimizer(ADAM, shards).state.items():
        (shard,) = (shard for shard in shards if shard.name == name)
        assert list(state) == ["exp_avg", "exp_avg_sq"]
        assert all(t.shape == shard.tensor.shape and t.dtype == torch.float64 for t in state.values())


def test_padding_rows_stay_zero() -> None:
    weight = torch.ones(4, 3)
    weight[3] = 0.0
    shard = make_shard("embedding", weight)
    optimizer = Optimizer(ADAM, [shard])
    for _ in range(3):
        shard.tensor.grad = torch.ones(4, 3)
        shard.gradient[3] = 0.0
        optimizer.step(1e-2)
    assert torch.equal(shard.tensor[3], torch.zeros(3))
    assert torch.all(shard.tensor[:3] < 1.0)


def test_frozen_shards_have_no_state_and_do_not_change() -> None:
    frozen = make_shard("frozen", torch.ones(2, 2), trainable=False)
    shards = [*make_shards(torch.float32), frozen]
    optimizer = Optimizer(ADAM, shards)
    set_gradients(shards[:-1], 1)
    optimizer.step(1e-2)
    assert "frozen" not in optimizer.state
    assert torch.equal(frozen.tensor, torch.ones(2, 2))


def test_the_first_adamw_step_moves_every_weight_by_the_learning_rate() -> None:
    # Without decay the first bias-corrected step is g / (|g| + eps): its sign.
    shards = make_shards()
    before = shards[1].tensor.clone()
    set_gradients(shards, 1)
    Optimizer(ADAM, shards).step(1e-3)
    moved = (before - shards[1].tensor) / shards[1].gradient.sign()
    assert torch.all((moved - 1e-3).abs() < 1e-3 * 1e-6)
    assert math.isclose(moved.mean().item(), 1e-3, rel_tol=1e-6)
