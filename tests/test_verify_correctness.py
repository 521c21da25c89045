"""verify_correctness.py: what it measures, on one process and on several, and what it says when something is wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import verify_correctness
from distributed import run_distributed, run_torchrun
from finetune_runs import write_tokens
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.importing import import_weights
from megatron.checkpoint.manager import save
from megatron.checkpoint.source import MODEL, CheckpointInfo, LocalTensor, RunState
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Axis, Topology
from megatron.errors import CheckpointError, ConfigError
from megatron.training.comparison import Comparison, overall
from reference import BERT, seeded, serial_stage, tiny_config

# Logits of this model are at most 10, so that 1e-5 is some ten units in the last place of fp32.
TOLERANCE = "--tolerance=1e-5"
LAYOUTS = {
    "TP2 PP2": ["--tensor_model_parallel_size=2", "--pipeline_model_parallel_size=2", "--sequence_parallel"],
    "TP2 DP2": ["--tensor_model_parallel_size=2", "--zero_stage=3", "--train_iters=2"],
}


def save_tiny_llama(folder: Path, **overrides: object) -> Path:
    # Imported here: every rank imports this module, and most of them have no use for transformers.
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_folders import SIZES

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.2, **overrides})).save_pretrained(folder)
    return folder


# With TP2 PP2 and sequence parallelism: all that a family adds to Llama is in one of the two.
ON_FOUR_RANKS = ("falcon 40b", "gemma")


def save_tiny(folder: Path, family: str) -> Path:
    from hf_folders import save_family

    # Norms of 0.3 keep logits small, so that a tolerance means the same for all.
    return save_family(folder, family, std=0.3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def native(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "tiny"
    import_weights(HuggingFaceSource(llama), folder, model_name="llama2", on_bytes=lambda num_bytes: None)
    return folder


@pytest.fixture(scope="module")
def damaged(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One number of one weight of the last layer differs."""
    folder = tmp_path_factory.mktemp("damaged")
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][7, 11] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((llama / "config.json").read_text())
    return folder


def verify(arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            verify_correctness.main(arguments)
        except SystemExit as end:
            assert isinstance(end.code, int)
            status = end.code
    return status, out.getvalue(), err.getvalue()


def arguments(load: Path, reference: Path, *others: object) -> list[str]:
    return [f"--load={load}", f"--huggingface_path={reference}", "--train_iters=4", *map(str, others)]


def test_logits_equal_those_of_transformers(native: Path, llama: Path) -> None:
    status, out, err = verify(["--model_name=llama2", *arguments(native, llama, TOLERANCE)])
    assert status == 0, out + err
    lines = out.splitlines()
    assert lines[0] == f"checkpoint {native} on TP1 PP1 DP1, fp32, cpu"
    assert lines[2] == "data       random tokens: 1 x 64 tokens a batch"  # the model's 64 positions are fewer than 256
    assert [line.split()[0] for line in lines[4:9]] == ["0", "1", "2", "3", "all"]
    assert lines[8].endswith("100.00%")
    assert re.fullmatch(r"CORRECT: the largest error of a logit is \S+e-0[67], within --tolerance 1e-05\.", lines[9])


def test_torchrun_verifies_with_tensor_pipeline_and_sequence_parallelism(native: Path, llama: Path) -> None:
    command = ["verify_correctness.py", *arguments(native, llama, TOLERANCE, *LAYOUTS["TP2 PP2"])]
    run = run_torchrun(command, nproc=4)
    assert run.returncode == 0, run.stdout
    assert f"checkpoint {native} on TP2 PP2 DP1, fp32, cpu\n" in run.stdout
    assert run.stdout.count("CORRECT") == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_weight_is_found_on_every_layout(damaged: Path, llama: Path, layout: str) -> None:
    results = run_distributed(verify, 4, arguments(damaged, llama, *LAYOUTS[layout]))
    assert {status for status, _, _ in results} == {1}
    assert "WRONG: the largest error of a logit is 7.889e-01, beyond --tolerance 0.001; " in results[0][2]
    assert [out for _, out, _ in results[1:]] == [""] * 3


def test_a_damaged_weight_fails_the_command_with_one_line(damaged: Path, llama: Path) -> None:
    status, out, err = verify(arguments(damaged, llama))
    assert status == 1
    assert "CORRECT" not in out
    assert re.fullmatch(
        r"WRONG: the largest error of a logit is \S+, beyond --tolerance 0.001; these are two models, or a weight is "
        r"damaged\.\n",
        err.splitlines(keepends=True)[-1],
    )


def test_every_layout_compares_the_same_tokens(native: Path, llama: Path) -> None:
    _, serial, _ = verify(arguments(native, llama))
    results = run_distributed(verify, 2, [*arguments(native, llama), "--zero_stage=1", "--train_iters=2"])
    # The reference's losses are those of one program; they are equal where the tokens are.
    assert column(results[0][1], 4) == column(serial, 4)


def test_the_batches_come_from_the_data_where_it_is_given(native: Path, llama: Path, tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "counting")
    flags = [TOLERANCE, f"--data_path={prefix}", "--seq_length=16", "--tokenizer_type=NullTokenizer", "--vocab_size=61"]
    status, out, err = verify(arguments(native, llama, *flags))
    assert status == 0, out + err
    assert f"data       {prefix}: 1 x 16 tokens a batch" in out


def test_a_hugging_face_folder_is_compared_with_itself(llama: Path) -> None:
    status, out, _ = verify([f"--load={llama}", "--train_iters=1", TOLERANCE])
    assert status == 0
    assert f"reference  {llama} in transformers" in out


@pytest.mark.parametrize("family", ["mistral", "falcon 7b", "gpt2", "qwen2", "qwen3", *ON_FOUR_RANKS])
def test_every_family_has_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family)
    status, out, err = verify([f"--load={folder}", "--train_iters=1", "--tolerance=1e-4"])
    assert status == 0, out + err
    assert column(out, 6) == ["100.00%", "100.00%"]


@pytest.mark.parametrize("family", ON_FOUR_RANKS)
def test_they_are_the_same_under_tensor_pipeline_and_sequence_parallelism(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, family)
    flags = [f"--load={folder}", "--train_iters=1", "--tolerance=1e-4", *LAYOUTS["TP2 PP2"]]
    status, out, err = run_distributed(verify, 4, flags)[0]
    assert status == 0, out + err
    assert "on TP2 PP2 DP1, fp32, cpu" in out and "CORRECT" in out


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A native checkpoint, and what transformers saves of the same weights."""
    from families import transformers_model

    config = tiny_config(**BERT, num_layers=2, init_method_std=0.1)
    folder, stage = tmp_path_factory.mktemp("bert"), serial_stage(config, seeded(config), dtype=torch.float32)
    transformers_model("bert", config, seeded(config)).module.float().save_pretrained(folder / "theirs")
    tensors = [
        LocalTensor(MODEL, spec.regions(0, 1), stage.get_parameter(name).detach())
        for name, spec in shard_specs(stage).items()
    ]
    save(folder / "ours", CheckpointInfo(RunState(iteration=1), config, "bert"), tensors, Axis("world"))
    return folder / "ours", folder / "theirs"


def test_berts_tokens_and_sentences_are_compared(bert: tuple[Path, Path]) -> None:
    ours, theirs = bert
    status, out, err = verify(arguments(ours, theirs, "--tolerance=1e-4"))
    assert status == 0, out + err
    assert column(out, 6)[-1] == "100.00%"
    status, out, err = run_distributed(verify, 4, arguments(ours, theirs, "--tolerance=1e-4", *LAYOUTS["TP2 PP2"]))[0]
    assert status == 0, out + err


def test_a_damaged_weight_behind_the_sentences_alone_is_found(bert: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = bert
    tensors = load_file(theirs / "model.safetensors")
    tensors["cls.seq_relationship.bias"][1] += 1.0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((theirs / "config.json").read_text())
    status, _, err = verify(arguments(ours, tmp_path))
    assert status == 1
    assert "WRONG: the largest error of a logit is 1.000e+00, beyond --tolerance 0.001; " in err


def test_bf16_is_compared_with_bf16(native: Path, llama: Path) -> None:
    status, out, err = verify(arguments(native, llama, "--bf16"))
    assert status == 0, out + err
    assert "bf16, cpu" in out and "within --tolerance 0.5" in out
    assert float(column(out, 1)[-1]) > 1e-3  # or it was fp32 after all


def test_a_tolerance_of_zero_asks_for_equal_bits(damaged: Path, native: Path, llama: Path) -> None:
    """Rounding differs between the programs, or does not: the verdict follows the error that is printed."""
    for load, is_equal in ((damaged, False), (native, None)):
        status, out, err = verify(arguments(load, llama, "--tolerance=0", "--train_iters=1"))
        largest = float(column(out, 1)[-1])
        assert ("beyond --tolerance 0;" in err) == (status == 1) == (largest > 0)
        assert is_equal is None or is_equal == (status == 0)


def test_what_cannot_be_compared_is_refused_before_any_process_waits(
    native: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message(ConfigError, []) == "--load is missing, and there is no checkpoint to verify; give its folder."
    assert message(ConfigError, [f"--load={native}"]) == (
        f"nothing says what to compare {native / 'iter_0000000'} with; give --huggingface_path, or --model_name and "
        "--model_size."
    )
    assert message(CheckpointError, [f"--load={native}", "--huggingface_path=/no/such/folder"]) == (
        "--huggingface_path /no/such/folder is neither a folder nor a name on the Hugging Face hub; check the spelling."
    )
    assert message(ConfigError, [f"--load={native}", "--model_name=llama2", "--model_size=8"]) == (
        "--size 8: llama2 was not published in this size; use one of 7, 13, 70."
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert message(ConfigError, arguments(native, llama)) == (
        "transformers is not installed, and it computes what to compare with; pip install 'transformers>=5'."
    )


def test_a_reference_with_another_vocabulary_is_refused(native: Path, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, vocab_size=137)
    assert message(CheckpointError, arguments(native, tmp_path)) == (
        f"{tmp_path} has 137 tokens and the checkpoint 131; compare it with the model that it was made from, before "
        "tokens are added."
    )


def test_a_folder_that_transformers_cannot_open_is_named(native: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = message(CheckpointError, arguments(native, tmp_path))
    assert text.startswith(f"{tmp_path} cannot be opened by transformers (")


def test_the_original_command_is_accepted(native: Path, llama: Path, tmp_path: Path) -> None:
    """With the flags of its getting-started guide, where --model_size named the download."""
    flags = ["--model_name=llama2", "--model_size=7", "--hidden_dropout", "0.0", "--attention_dropout", "0.0"]
    flags += ["--no_bias_gelu_fusion", f"--huggingface_cache={tmp_path}", "--huggingface_device=cpu"]
    status, out, err = verify(arguments(native, llama, *flags))
    assert status == 0, out + err


def test_a_nan_in_one_batch_is_the_overall_error() -> None:
    good, bad = Comparison(1e-6, 1e-7, 5.0, 5.0, 1.0), Comparison(float("nan"), 1e-7, 5.0, 5.0, 1.0)
    for comparisons in ([good, bad], [bad, good]):
        assert not overall(comparisons).max_error <= 1.0
    assert overall([good, Comparison(3e-6, 3e-7, 4.0, 4.0, 0.0)]) == pytest.approx(
        Comparison(3e-6, 2e-7, 4.5, 4.5, 0.5)
    )


def message(kind: type[Exception], argv: list[str]) -> str:
    """The error of a command that ends before, or together with, its process group."""
    try:
        with pytest.raises(kind) as error:
            verify_correctness.main(argv)
    finally:
        Topology.serial().close()
    return str(error.value)


def column(out: str, number: int) -> list[str]:
    return [line.split()[number] for line in out.splitlines() if re.match(r" +(\d+|all) ", line)]
