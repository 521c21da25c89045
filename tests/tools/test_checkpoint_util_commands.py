"""verify, show and diff of tools/checkpoint_util.py: what they say, and the status they end with."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoint_samples import INFO, save_from_one_process
from hf_folders import save_llama, stored_tensors
from legacy_trees import LLAMA, Spelling, random_weights, write_tree
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError, ConfigError

SCRIPT = Path(__file__).parents[2] / "tools" / "checkpoint_util.py"
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the tool in this process; its status and what it printed."""
    spec = importlib.util.spec_from_file_location("checkpoint_util", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words: object) -> tuple[int, str]:
        try:
            module.main([str(word) for word in words])
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def test_verify_says_that_nothing_is_damaged(tmp_path: Path, run: Run) -> None:
    folder = save_from_one_process(tmp_path, ParallelLayout(tp=2, pp=2))
    status, report = run("verify", tmp_path)
    assert status == 0
    assert f"{folder}: no damage in 5 file(s), " in report
    assert run("verify", folder)[0] == 0


def test_verify_names_every_damaged_tile_of_every_file(tmp_path: Path, run: Run) -> None:
    folder = save_from_one_process(tmp_path, ParallelLayout(tp=2))
    for name, position in (("rank_00000", -1), ("rank_00000", -2000), ("rank_00001", -1)):
        flip(folder / f"{name}.safetensors", position)
    status, report = run("verify", tmp_path, "--num_workers", 2)
    assert status == 1
    damaged = [line for line in report.splitlines() if line.startswith("DAMAGED")]
    assert [line.count("rank_00000.safetensors: the tile at rows ") for line in damaged] == [1, 1, 0]
    assert "rank_00001.safetensors: the tile at rows " in damaged[2]
    assert " of optimizer.exp_avg_sq.layers.4.attention.v.weight[4:8, 0:24] (bytes " in damaged[2]
    assert f"{folder}: 3 damaged place(s) in 3 file(s)" in report


def test_verify_all_looks_at_every_iteration_of_a_run(tmp_path: Path, run: Run) -> None:
    for iteration in (10, 20):
        info = dataclasses.replace(INFO, state=dataclasses.replace(INFO.state, iteration=iteration))
        save_from_one_process(tmp_path, ParallelLayout(), info=info)
    (tmp_path / "iter_0000010" / "manifest.json").unlink()
    assert run("verify", tmp_path)[0] == 0
    status, report = run("verify", tmp_path, "--all")
    assert status == 1
    assert f"{tmp_path / 'iter_0000010' / 'manifest.json'} cannot be read (No such file or directory)" in report
    assert f"{tmp_path / 'iter_0000020'}: no damage" in report


def test_verify_reads_a_format_without_checksums_to_its_end(tmp_path: Path, run: Run) -> None:
    save_llama(tmp_path / "hf")
    status, report = run("verify", tmp_path / "hf")
    assert status == 0 and "is of a format without checksums" in report and "no damage" in report


def test_verify_reads_the_files_of_a_released_tree(tmp_path: Path, run: Run) -> None:
    weights = random_weights(LLAMA)
    write_tree(tmp_path / "tree", LLAMA, weights, Spelling(tp=2, pp=2), name="release")
    status, printed = run("verify", tmp_path / "tree")
    assert status == 0
    assert "tree/release is of a format without checksums" in printed
    assert "no damage in 4 file(s)" in printed


def test_verify_of_what_is_no_checkpoint_is_an_error(tmp_path: Path, run: Run) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run("verify", tmp_path)
    save_from_one_process(tmp_path, ParallelLayout())
    with pytest.raises(ConfigError, match="--all"):
        run("verify", tmp_path, "--all", "--load_iters", 10)
    with pytest.raises(CheckpointError, match="asks for iteration 11"):
        run("verify", tmp_path, "--load_iters", 11)


def test_show_names_what_a_checkpoint_consists_of(tmp_path: Path, run: Run) -> None:
    save_from_one_process(tmp_path, ParallelLayout(tp=2, pp=2))
    status, report = run("show", tmp_path)
    assert status == 0
    rows = [line.split() for line in report.splitlines()]
    for row in (["iteration", "10"], ["num_layers", "5"], ["optimizer", "step=10"], ["consumed", "samples", "40"]):
        assert row in rows
    assert [row[0] for row in rows if row and row[0].startswith("rank_00003")] == ["rank_00003.safetensors"]
    assert "0-4" in report and "embedding.word.weight  [103, 24] F32" in report


def test_show_works_for_another_format(tmp_path: Path, run: Run) -> None:
    save_llama(tmp_path / "hf")
    status, report = run("show", tmp_path / "hf")
    assert status == 0 and "none: weights only" in report and "{k, v}.weight" in report


def test_diff_of_two_layouts_of_one_checkpoint_finds_nothing(tmp_path: Path, run: Run) -> None:
    save_from_one_process(tmp_path / "a", ParallelLayout(tp=2, pp=2))
    save_from_one_process(tmp_path / "b", ParallelLayout(tp=4, dp=2), by_rows=True)
    status, report = run("diff", tmp_path / "a", tmp_path / "b")
    assert status == 0 and "0 different; without counterpart: 0; settings that differ: 0" in report


def test_diff_names_settings_and_tensors_that_differ(tmp_path: Path, run: Run) -> None:
    save_from_one_process(tmp_path / "a", ParallelLayout())
    state = dataclasses.replace(INFO.state, seed=8)
    model = dataclasses.replace(INFO.model, rope_theta=5e5)
    other = dataclasses.replace(INFO, state=state, model=model)
    save_from_one_process(tmp_path / "b", ParallelLayout(), info=other, dtype=torch.bfloat16)
    status, report = run("diff", tmp_path / "a", tmp_path / "b")
    assert status == 1
    assert "model.rope_theta: 10000.0 and 500000.0\n" in report and "seed: 7 and 8\n" in report
    assert "model.embedding.word.weight: float32 and bfloat16, " in report and "... and " in report
    assert run("diff", tmp_path / "a", tmp_path / "b", "--weights_only")[1].count("seed") == 0


def test_diff_of_a_checkpoint_and_its_hugging_face_model_compares_the_weights(tmp_path: Path, run: Run) -> None:
    save_llama(tmp_path / "hf")
    run("--load_dir", tmp_path / "hf", "--save_dir", tmp_path / "native", "--target_tensor_parallel_size", 2)
    status, report = run("diff", tmp_path / "native", tmp_path / "hf")
    assert status == 0 and "one of them is weights only" in report


def test_weights_that_do_not_say_what_they_are_are_read_with_the_config_that_is_given(tmp_path: Path, run: Run) -> None:
    save_llama(tmp_path / "hf")
    (tmp_path / "weights").mkdir()
    torch.save(stored_tensors(tmp_path / "hf"), tmp_path / "weights" / "model.pt")
    given = ("--load_dir", tmp_path / "weights" / "model.pt", "--config", tmp_path / "hf" / "config.json")
    run(*given, "--save_dir", tmp_path / "native", "--target_pipeline_parallel_size", 2)
    assert run("diff", tmp_path / "native", tmp_path / "hf")[0] == 0
    with pytest.raises(ConfigError, match="native describes its model itself, or is no checkpoint; drop --config"):
        run("show", tmp_path / "native", "--config", tmp_path / "hf")


def test_an_option_that_does_not_exist_is_named_with_its_command(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ConfigError, match="--num_worker is not a flag of this program; did you mean --num_workers"):
        run("verify", tmp_path, "--num_worker", 2)
    with pytest.raises(ConfigError, match="--num_workers 0 is not a positive number"):
        run("diff", tmp_path, tmp_path, "--num_workers", 0)
