"""The same seed gives the same run: initial weights on every layout, dropout masks wherever the activation is whole."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from distributed import run_distributed
from megatron.core.sharding import Region
from megatron.model.init import initial_value
from megatron.optimizer.config import OptimizerConfig
from reference import tiny_config
from training_runs import Layout, batches_of_rank, make_step

SGD = OptimizerConfig(optimizer="sgd", lr=0.05, lr_decay_iters=2, weight_decay=0.0)
DROPOUT = tiny_config(num_layers=4, hidden_dropout=0.1, attention_dropout=0.1)
SEED = 7


def weights_of(layout: Layout) -> list[tuple[Region, Tensor]]:
    step = make_step(DROPOUT, layout, partial(initial_value, DROPOUT, SEED), SGD)
    return [
        (region, shard.tensor.detach()[region.local_slices].clone())
        for shard in step.data_parallel.shards
        for region in shard.regions(step.topology.tp)
    ]


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=4), Layout(tp=2, pp=2), Layout(pp=2, dp=2, zero_stage=3), Layout(pp=2, schedule="interleaved")],
    ids=str,
)
def test_initial_weights_are_identical_on_every_layout(layout):
    (serial,) = run_distributed(weights_of, 1, Layout())
    whole = {region.name: value for region, value in serial}
    for pieces in run_distributed(weights_of, layout.world_size, layout):
        for region, value in pieces:
            assert torch.equal(value, whole[region.name][region.global_slices]), region


def two_losses(layout: Layout) -> list[float]:
    """Two steps with dropout; the second depends on the gradients of the first, so on the masks of both passes."""
    step = make_step(DROPOUT, layout, partial(initial_value, DROPOUT, SEED), SGD)
    return [step.run(batches_of_rank(number, step), number + 1, SGD.lr).loss for number in range(2)]


def losses_on(layout: Layout) -> list[float]:
    results = run_distributed(two_losses, layout.world_size, layout)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2),
        Layout(pp=4, schedule="gpipe"),
        Layout(pp=2, schedule="interleaved", recompute="uniform"),
        Layout(dp=2, recompute="selective"),
        Layout(dp=4, zero_stage=3),
        Layout(pp=2, dp=2, zero_stage=1),
    ],
    ids=str,
)
def test_dropout_does_not_depend_on_pipeline_data_parallelism_or_recompute(layout):
    # float64 sums in another order; the masks either agree exactly or move the loss by about 1e-3.
    assert losses_on(layout) == pytest.approx(losses_on(Layout()), rel=1e-10)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recompute", ["selective", "uniform"])
def test_where_the_activation_is_sharded_recompute_and_a_second_run_repeat_the_same_masks(sequence_parallel, recompute):
    kept = Layout(tp=2, sequence_parallel=sequence_parallel)
    again = Layout(tp=2, sequence_parallel=sequence_parallel, recompute=recompute)
    assert losses_on(kept) == losses_on(kept)
    assert losses_on(again) == pytest.approx(losses_on(kept), rel=1e-10)


def test_dropout_changes_the_loss():
    """Without this, the laws above would hold for a model that ignored its dropout."""
    with_dropout = losses_on(Layout())
    step_without = run_distributed(two_losses_without_dropout, 1)[0]
    assert abs(with_dropout[0] - step_without[0]) > 1e-4


def two_losses_without_dropout() -> list[float]:
    config = tiny_config(num_layers=4)
    step = make_step(config, Layout(), partial(initial_value, config, SEED), SGD)
    return [step.run(batches_of_rank(number, step), number + 1, SGD.lr).loss for number in range(2)]
