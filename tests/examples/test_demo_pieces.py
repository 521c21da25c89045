"""The programs of examples/ that the demo uses, and the demo's own way of running commands."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megatron.checkpoint.hf import HuggingFaceSource
from tiny_tokenizers import SENTENCEPIECE_PIECES, TEXT, write_sentencepiece

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 6,
    "num_attention_heads_kv": 2,
    "max_position_embeddings": 64,
}


def program(name: str) -> Callable[[Sequence[str]], None]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    flags = [f"--{name}={size}" for name, size in SIZES.items()]
    program("make_tiny_llama")([f"--tokenizer={write_sentencepiece(folder)}", f"--output={folder / 'hf'}", *flags])
    return folder / "hf"


@pytest.fixture(scope="module")
def ignorant_llama(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All logits are 0, so that every token is as likely as any other."""
    folder = tmp_path_factory.mktemp("ignorant")
    model = LlamaForCausalLM.from_pretrained(llama)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture
def chapters(tmp_path: Path) -> Path:
    file = tmp_path / "chapters.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("of another kind", TEXT, TEXT)))
    return file


def test_the_small_llama_has_the_sizes_that_were_asked_for(llama: Path) -> None:
    model = HuggingFaceSource(llama).model_config()
    assert {name: getattr(model, name) for name in SIZES} == SIZES
    assert model.vocab_size == SENTENCEPIECE_PIECES


def test_transformers_and_the_training_data_get_the_same_ids_from_the_tokenizer(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    pieces = SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    assert tokenizer(TEXT).input_ids == pieces.encode(TEXT)
    assert tokenizer.eos_token_id == pieces.eos_id()


def test_every_model_continues_the_prompt_and_the_seed_decides_how(
    llama: Path, ignorant_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(seed: int) -> str:
        flags = ["--prompt", "It is a truth", "--max_new_tokens=12", f"--seed={seed}"]
        program("generate")([str(llama), str(ignorant_llama), *flags])
        return capsys.readouterr().out

    printed = generate(1)
    assert f"{llama}:\nIt is a truth" in printed
    assert f"{ignorant_llama}:\nIt is a truth" in printed
    assert printed == generate(1) != generate(2)


def test_a_model_that_knows_nothing_has_the_logarithm_of_its_vocabulary_as_loss(
    ignorant_llama: Path, chapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program("held_out_loss")([str(ignorant_llama), "--text", str(chapters), "--seq_length=16"])
    assert f"held-out loss {math.log(SENTENCEPIECE_PIECES):.4f}, perplexity 320.0" in capsys.readouterr().out


def test_the_held_out_loss_is_that_of_the_last_documents_window_by_window(
    llama: Path, chapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers computes the loss of a window itself, when it is given labels; one window has 32 of them."""
    tokens = [*AutoTokenizer.from_pretrained(llama)(TEXT).input_ids, 2]
    model = AutoModelForCausalLM.from_pretrained(llama)
    windows = [torch.tensor([tokens[start : start + 33]]) for start in range(0, len(tokens) - 32, 32)]
    losses = [model(window, labels=window).loss.item() for window in windows]
    program("held_out_loss")([str(llama), "--text", str(chapters), "--last_documents=1", "--seq_length=32"])
    printed = float(capsys.readouterr().out.split("held-out loss ")[1].split(",")[0])
    # Printed to 4 decimals.
    assert printed == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_a_loss_that_falls_by_less_than_expected_ends_in_a_failure(ignorant_llama: Path, chapters: Path) -> None:
    models = [str(ignorant_llama)] * 2
    with pytest.raises(SystemExit, match=r"fell by 0\.0000; expected was a fall by at least 0\.5"):
        program("held_out_loss")([*models, "--text", str(chapters), "--seq_length=16", "--expected_fall=0.5"])
    program("held_out_loss")([*models, "--text", str(chapters), "--seq_length=16", "--expected_fall=0"])


def write_metrics(folder: Path, losses: dict[int, float]) -> Path:
    """A run that logged these training losses, and an evaluation after its last iteration."""
    folder.mkdir()
    lines: list[dict[str, float]] = [{"iteration": iteration, "lm_loss": loss} for iteration, loss in losses.items()]
    lines.append({"iteration": max(losses), "validation_loss": losses[max(losses)] + 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "metrics.jsonl"


def test_two_runs_are_compared_where_both_have_been(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_metrics(tmp_path / "first", {1: 5.0, 2: 4.0, 3: 3.0})
    second = write_metrics(tmp_path / "second", {2: 4.0, 3: 3.0 + 3e-6})
    program("compare_losses")([str(first), str(second)])
    heading, *rows = capsys.readouterr().out.splitlines()
    assert "relative difference" in heading
    assert [row.split()[:2] for row in rows] == [["2", "training"], ["3", "training"], ["3", "validation"]]
    # 3e-6 / 3 and, one above, 3e-6 / 4
    assert [row.split()[-1] for row in rows] == ["0.0e+00", "1.0e-06", "7.5e-07"]


def test_losses_that_differ_end_in_a_failure(tmp_path: Path) -> None:
    first, second = (write_metrics(tmp_path / str(loss), {7: loss}) for loss in (4.0, 4.001))
    with pytest.raises(SystemExit, match=r"differ by up to 2\.5e-04, and --tolerance is 1\.0e-05"):
        program("compare_losses")([str(first), str(second)])
    program("compare_losses")([str(first), str(second), "--tolerance=1e-3"])


def test_a_loss_that_is_not_a_number_differs_from_every_number(tmp_path: Path) -> None:
    first = write_metrics(tmp_path / "first", {1: 4.0, 2: 4.0})
    second = tmp_path / "second" / "metrics.jsonl"
    second.parent.mkdir()
    second.write_text('{"iteration": 1, "lm_loss": 4.0}\n{"iteration": 2, "lm_loss": null}\n')
    with pytest.raises(SystemExit, match="the losses differ"):
        program("compare_losses")([str(first), str(second)])


def test_runs_without_a_common_iteration_cannot_be_compared(tmp_path: Path) -> None:
    first, second = (write_metrics(tmp_path / str(iteration), {iteration: 1.0}) for iteration in (1, 2))
    with pytest.raises(SystemExit, match="no iteration in common"):
        program("compare_losses")([str(first), str(second)])


def test_the_losses_of_several_runs_become_one_picture(tmp_path: Path) -> None:
    runs = [write_metrics(tmp_path / name, {1: 2.0, 2: 1.0}) for name in ("tp2-pp2", "pp2-dp2")]
    program("plot_loss")([*map(str, runs), "--output", str(tmp_path / "loss.svg")])
    program("plot_loss")([*map(str, runs), "--output", str(tmp_path / "loss.png")])
    picture = (tmp_path / "loss.svg").read_text()
    assert "<!-- tp2-pp2 -->" in picture
    assert "<!-- pp2-dp2: validation -->" in picture
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def run_as_the_demo_does(commands: str) -> subprocess.CompletedProcess[str]:
    """`commands` after the functions of demo.sh."""
    script = (EXAMPLES / "demo.sh").read_text()
    functions = script[script.index("set -euo pipefail") : script.index("\nrun <<")]
    bash = ["bash", "-c", functions + commands, str(EXAMPLES / "demo.sh")]
    return subprocess.run(bash, capture_output=True, text=True, timeout=60)


def test_the_demo_prints_a_command_as_it_can_be_typed_and_runs_it() -> None:
    command = "printf '%s-' one \\\n    two | tr a-z A-Z"
    result = run_as_the_demo_does(f"\nrun <<'COMMAND'\n{command}\nCOMMAND\n")
    assert result.returncode == 0
    assert result.stdout == f"\n$ {command}\nONE-TWO-"


def test_a_command_that_fails_ends_the_demo_and_is_named() -> None:
    result = run_as_the_demo_does("\nrun <<'COMMAND'\nfalse | cat\nCOMMAND\nrun <<'COMMAND'\necho later\nCOMMAND\n")
    assert result.returncode == 1
    assert "this command failed:\nfalse | cat" in result.stderr
    assert "later" not in result.stdout
