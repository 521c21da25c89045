"""A run that changes its layout again and again, each time loading what another layout saved, loses nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from finetune_runs import assert_same_bits, command, finetune_runs, finetune_succeeds, stored_entries, write_tokens
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.source import RunState
from megatron.training.sinks import METRICS_FILE, read_metrics

GRID = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1}
# TP4 has two copies of each key/value head, interleaved stages lie two on a rank.
CHAIN: tuple[dict[str, object], ...] = (
    GRID,
    {"tensor_model_parallel_size": 4, "sequence_parallel": None},
    {"pipeline_model_parallel_size": 4},
    {"zero_stage": 3},
    {**GRID, "num_layers_per_virtual_pipeline_stage": 1},
)
FLAGS = {"hidden_dropout": 0, "attention_dropout": 0, "eval_iters": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def state_of(folder: Path) -> RunState:
    """Step, data position, seed, scheduler, optimizer: all but the flags, which name the layout."""
    state = open_source(folder).state()
    assert state is not None
    return dataclasses.replace(state, config={})


def test_weights_masters_moments_and_position_pass_through_every_layout_bit_for_bit(data, tmp_path):
    """Each layout loads and saves without training in between."""
    folders = [tmp_path / str(number) for number in range(len(CHAIN))]
    first, *others = (
        command(data, save=folder, train_iters=3, **FLAGS, **layout)
        for folder, layout in zip(folders, CHAIN, strict=True)
    )
    loads = [["--load", str(before)] for before in folders]
    runs = finetune_runs(4, first, *([*argv, *load] for argv, load in zip(others, loads, strict=False)))
    assert [[ending.status for ending in run] for run in runs] == [[0] * 4] * 5, runs[-1][0].err
    assert [run[0].out.count("lm loss") for run in runs] == [3, 0, 0, 0, 0]
    entries, state = stored_entries(folders[0]), state_of(folders[0])
    assert (state.iteration, state.consumed_samples, state.seed) == (3, 12, 1234)
    assert state.optimizer["num_steps"] == 3
    assert {name.split(".")[0] for name in entries} == {"model", "optimizer"}
    for folder in folders[1:]:
        assert_same_bits(stored_entries(folder), entries)
        assert state_of(folder) == state


def test_losses_go_on_as_if_one_process_had_never_stopped(data, tmp_path):
    serial, run = tmp_path / "serial", tmp_path / "run"
    flags = {**FLAGS, "train_iters": 10, "load": run, "save": run, "exit_interval": 2}
    finetune_succeeds(1, command(data, **{**flags, "load": False, "save": serial, "exit_interval": False}))
    finetune_succeeds(4, *(command(data, **flags, **layout) for layout in CHAIN))
    assert [line["iteration"] for line in read_metrics(run / METRICS_FILE)] == list(range(1, 11))
    for name, tolerance in (("lm_loss", 1e-5), ("grad_norm", 1e-4)):  # fp32 sums in another order; a sum of squares
        expected = [line[name] for line in read_metrics(serial / METRICS_FILE)]
        assert [line[name] for line in read_metrics(run / METRICS_FILE)] == pytest.approx(expected, rel=tolerance)
    assert state_of(run) == state_of(serial)
