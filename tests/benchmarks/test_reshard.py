"""What the resharding benchmark measures is the same work on all sides: the same tensors, the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.reshard import make_inputs, model_of, report
from benchmarks.reshard_tasks import INPUTS, LAYOUTS, TASKS, main, weight_files
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.placement import regions_of_rank
from megatron.model.config import ModelConfig

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_attention_heads_kv=4,
    ffn_hidden_size=24,
    vocab_size=64,
    max_position_embeddings=64,
    use_rms_norm=True,
    glu_activation="swiglu",
    position_embedding_type="rotary",
    tie_embed_logits=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(MODEL, folder)
    return folder


@pytest.mark.parametrize("case", list(INPUTS))
def test_all_sides_write_every_tensor_of_the_model(case: str, folder: Path) -> None:
    source = open_source(folder / INPUTS[case])
    num_elements = sum(torch.Size(source.shape(name)).numel() for name in source.names())
    for side, task in TASKS.items():
        shutil.rmtree(folder / "output", ignore_errors=True)
        task(case, folder, folder / "output")
        if side == "floor":
            written = (folder / "output" / "file").stat().st_size
            assert written == sum(file.stat().st_size for file in weight_files(folder / INPUTS[case]))
        elif side == "ours":
            assert set(open_source(folder / "output").names()) == set(source.names())
        else:
            held = [torch.load(file, weights_only=True) for file in weight_files(folder / "output")]
            assert sum(tensor.numel() for rank in held for tensor in rank.values()) >= num_elements


@pytest.mark.parametrize("case", ["tp1-tp4", "tp4-tp2"])
def test_the_classic_way_gives_each_rank_its_rectangles(case: str, folder: Path) -> None:
    shutil.rmtree(folder / "output", ignore_errors=True)
    TASKS["classic"](case, folder, folder / "output")
    source = open_source(folder / "tp1")
    for rank, file in enumerate(weight_files(folder / "output")):
        held = torch.load(file, weights_only=True)
        for region in regions_of_rank(MODEL, LAYOUTS[case], rank):
            assert torch.equal(held[region.name], source.read(f"model.{region.name}", region.start, region.size))


def test_a_measurement_has_every_figure_of_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    main("ours", "tp1-tp4", folder, folder / "result.json")
    side = {"seconds": 3.0, "cpu_s": 2.0, "user_s": 1.0, "extra_mib": 50.0}
    text = report({"tp1-tp4": {"floor": [side], "ours": [side | {"seconds": 4.5}], "classic": [side]}}, 2.0)
    assert "| tp1-tp4 | 3.00 | 4.50 | 1.50 (1.50 to 1.50), met | 50 | 2.0, 1.0 | 3.00 | 50 |" in text
    assert "**short**" in report({"tp1-tp4": {name: [side | {"seconds": s}] for name, s in
                                              (("floor", 1.0), ("ours", 2.1), ("classic", 9.0))}}, 2.0)  # fmt: skip


def test_the_model_is_as_large_as_was_asked_for() -> None:
    model = model_of(2.0)
    num_elements = 2 * model.vocab_size * 2048 + model.num_layers * (4 * 2048**2 + 3 * 2048 * 5504)
    assert abs(num_elements * 2 / 2**30 - 2.0) < 0.05
