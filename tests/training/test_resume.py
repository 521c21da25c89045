"""A run that is interrupted and resumed is the run that never stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_runs import assert_same_bits, command, finetune_succeeds, stored_entries, write_tokens
from megatron.training.sinks import METRICS_FILE, read_metrics

# Figures that follow from wall times and the process differ from run to run.
EXACT = ("lm_loss", "learning_rate", "grad_norm", "consumed_samples", "valid_tokens", "validation_loss")

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "PP2 interleaved": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "DP2 ZeRO-1": (2, {"zero_stage": 1}),
    "TP2 sequence parallel": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": None, "recompute_granularity": "selective"},
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def history(folder: Path) -> list[dict[str, float | int | None]]:
    """Per iteration the figures that a repetition has to give again, to the last bit."""
    return [{name: line[name] for name in EXACT if name in line} for line in read_metrics(folder / METRICS_FILE)]


@pytest.mark.parametrize("precision", [{}, {"bf16": None}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_run_is_the_uninterrupted_one_bit_for_bit(layout, precision, data, tmp_path):
    world_size, flags = LAYOUTS[layout]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = {**flags, **precision}
    _, second, third = finetune_succeeds(
        world_size,
        command(data, save=whole, **flags),
        command(data, save=parts, load=parts, exit_interval=10, **flags),
        command(data, save=parts, load=parts, **flags),
    )
    assert "--exit_interval 10 at iteration 10: leaving" in second
    assert [line["consumed_samples"] for line in history(whole)] == list(range(4, 84, 4))
    assert sum("validation_loss" in line for line in history(whole)) == 4
    assert history(parts) == history(whole)
    appended = [json.loads(line) for line in (parts / METRICS_FILE).read_text().splitlines()]
    assert [line["iteration"] for line in appended if "lm_loss" in line] == list(range(1, 21))
    assert_same_bits(stored_entries(parts), stored_entries(whole))
    assert "order of the samples changes" not in third


def test_a_run_that_changes_its_layout_twice_has_the_losses_of_the_serial_run(data, tmp_path):
    serial, run, copy = tmp_path / "serial", tmp_path / "run", tmp_path / "copy"
    flags = {"hidden_dropout": 0, "attention_dropout": 0}
    grid = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": None}
    finetune_succeeds(1, command(data, save=serial, **flags))
    finetune_succeeds(4, command(data, save=run, exit_interval=7, **flags, **grid))
    copied, *_ = finetune_succeeds(
        2,
        command(data, load=run, save=copy, train_iters=7, zero_stage=3, **flags),
        command(data, load=run, save=run, exit_interval=7, zero_stage=3, **flags),
        command(data, load=run, save=run, pipeline_model_parallel_size=2, **flags),
    )
    assert "nothing is trained" in copied
    assert_same_bits(stored_entries(copy), stored_entries(run, 7))
    assert len(list((copy / "iter_0000007").glob("rank_*"))) == 2
    for name in ("lm_loss", "validation_loss", "grad_norm"):
        expected = [line[name] for line in history(serial) if name in line]
        # fp32 sums in another order; the norm is a sum of squares of sums.
        close = pytest.approx(expected, rel=1e-4 if name == "grad_norm" else 1e-5)
        assert [line[name] for line in history(run) if name in line] == close


def test_a_longer_continuation_says_whether_the_order_of_the_samples_changes(data, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    _, _, longer, longest = finetune_succeeds(
        1,
        command(data, save=whole, train_iters=8, lr_decay_iters=20),
        command(data, save=run, train_iters=5, lr_decay_iters=20),
        # 20 samples and 32 samples are both from the one epoch of 59; 80 take a second one.
        command(data, save=run, load=run, train_iters=8, lr_decay_iters=20),
        command(data, save=run, load=run, train_iters=20, lr_decay_iters=20),
    )
    assert "order of the samples" not in longer
    assert_same_bits(stored_entries(run, 8), stored_entries(whole))
    assert (
        "note: the checkpoint's run was laid out for 32 samples and this one for 80: the order of the samples changes"
    ) in longest


def test_a_resumed_run_may_have_another_batch_size(data, tmp_path):
    """It goes on behind the samples that the larger batches have consumed, and has enough of them to the end."""
    finetune_succeeds(
        1,
        command(data, save=tmp_path, exit_interval=12),
        command(data, save=tmp_path, load=tmp_path, global_batch_size=1, train_iters=24),
    )
    assert [line["consumed_samples"] for line in history(tmp_path)] == [*range(4, 49, 4), *range(49, 61)]


def test_another_seed_and_other_data_are_told(data, tmp_path):
    _, resumed, elsewhere = finetune_succeeds(
        1,
        command(data, save=tmp_path, train_iters=2, seed=5),
        command(data, save=tmp_path, load=tmp_path, train_iters=3, seed=6),
        command(data, save=tmp_path, load=tmp_path, train_iters=4, seed=6, split="9,1"),
    )
    assert "note: --seed 6 is not the checkpoint's 5: samples come in another order" in resumed
    assert "the training data is not" not in resumed and "note: --seed" not in elsewhere
    assert "note: the training data is not that of the checkpoint: its files, their weights, --split" in elsewhere
