"""One command, any layout: the same weights to start with, the same samples, the same dropout, the same losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from finetune_runs import command, finetune_succeeds, stored_entries, write_tokens
from megatron.training.sinks import METRICS_FILE, read_metrics

INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
TENSOR = {"tensor_model_parallel_size": 2}

# With dropout on activations that no tensor rank holds a part of; world size and flags.
WITH_DROPOUT: Mapping[str, tuple[int, Mapping[str, object]]] = {
    "DP2": (2, {}),
    "DP2 ZeRO-2, full recomputation": (2, {"zero_stage": 2, "recompute_granularity": "full"}),
    "PP2 GPipe": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "gpipe"}),
    "PP2 interleaved": (2, INTERLEAVED),
    "PP2 DP2 ZeRO-3": (4, {"pipeline_model_parallel_size": 2, "zero_stage": 3}),
}
WITHOUT_DROPOUT: Mapping[str, tuple[int, Mapping[str, object]]] = {
    "TP2": (2, TENSOR),
    "TP2 PP2 interleaved, sequence parallel": (4, {**TENSOR, **INTERLEAVED, "sequence_parallel": None}),
    "TP2 DP2 ZeRO-1, sequence parallel": (4, {**TENSOR, "zero_stage": 1, "sequence_parallel": None}),
    # Two key/value heads on four ranks: each rank holds a copy.
    "TP4": (4, {"tensor_model_parallel_size": 4}),
}
CASES = [(name, 0.1) for name in WITH_DROPOUT] + [(name, 0.0) for name in WITHOUT_DROPOUT]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="module")
def serial(data, tmp_path_factory) -> Mapping[float, Path]:
    """The serial runs by their dropout."""
    folders = {dropout: tmp_path_factory.mktemp("serial") for dropout in (0.0, 0.1)}
    finetune_succeeds(1, *(argv(data, folder, dropout) for dropout, folder in folders.items()))
    return folders


def argv(data: Path, save: Path, dropout: float, **flags: object) -> list[str]:
    return command(data, save=save, train_iters=6, hidden_dropout=dropout, attention_dropout=dropout, **flags)


def figures(folder: Path) -> list[float | int | None]:
    """Training and validation losses in order."""
    lines = read_metrics(folder / METRICS_FILE)
    return [line[name] for line in lines for name in ("lm_loss", "validation_loss") if name in line]


@pytest.mark.parametrize(("name", "dropout"), CASES)
def test_every_layout_has_the_losses_of_one_process(name, dropout, data, serial, tmp_path):
    world_size, flags = {**WITH_DROPOUT, **WITHOUT_DROPOUT}[name]
    finetune_succeeds(world_size, argv(data, tmp_path, dropout, **flags))
    # fp32 sums in another order; another sample or mask moves a loss by 1e-2.
    assert figures(tmp_path) == pytest.approx(figures(serial[dropout]), rel=1e-5)
    stored, expected = stored_entries(tmp_path), stored_entries(serial[dropout])
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


def test_a_hundredth_is_what_other_masks_make_of_a_loss(data, serial, tmp_path):
    """Without this the bound above could hold for a model that ignores its dropout."""
    with_dropout, without = figures(serial[0.1]), figures(serial[0.0])
    assert all(a != pytest.approx(b, rel=1e-3) for a, b in zip(with_dropout[1:], without[1:], strict=True))
