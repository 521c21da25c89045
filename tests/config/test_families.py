"""Families on the command line: what they set, which checkpoints are theirs, and what cannot be trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config import CheckpointArguments, RunConfig, parse_run, resolve
from megatron.errors import ConfigError
from megatron.model.presets import MODEL_NAMES, PRESETS, family_defaults, preset

RUN = ["--micro_batch_size=1", "--train_iters=1", "--lr=1e-3", "--data_path=tokens"]
SIZES = ["--num_layers=2", "--hidden_size=64", "--num_attention_heads=4", "--max_position_embeddings=32"]


def resolved(*flags: str, vocab_size: int = 100) -> RunConfig:
    return resolve(parse_run([*RUN, *flags]), 1, tokenizer_vocab_size=vocab_size)


@pytest.mark.parametrize(("model_name", "size"), PRESETS)
def test_every_published_size_is_its_preset(model_name: str, size: str) -> None:
    published = preset(model_name, size)
    run = resolved(f"--model_name={model_name}", f"--size={size}", vocab_size=published.vocab_size)
    assert run.model == published


@pytest.mark.parametrize("model_name", [name for name in MODEL_NAMES if name != "gpt"])
def test_every_family_is_recognised_in_its_checkpoints_and_in_no_other(model_name: str) -> None:
    """Families that differ in sizes and numbers alone cannot be told apart by their marks: llama2 is mistral."""
    model = resolved(*SIZES, f"--model_name={model_name}").model
    alike = {"llama", "llama2", "codellama", "llama3", "mistral", "qwen2"}
    for other in MODEL_NAMES:
        is_theirs = other in ("gpt", model_name) or {other, model_name} <= alike
        flags = ["--load=/ckpt", "--use_checkpoint_args", f"--model_name={other}"]
        if is_theirs:
            assert resolve(parse_run([*RUN, *flags]), 1, checkpoint=CheckpointArguments(model)).model == model
        else:
            with pytest.raises(ConfigError, match=f"^--model_name {other} has .*: it is of another family; give the"):
                resolve(parse_run([*RUN, *flags]), 1, checkpoint=CheckpointArguments(model))


def test_flags_of_the_families_make_any_mixture() -> None:
    flags = ["--parallel_attn", "--parallel_layernorm", "--sliding_window_size=8", "--qk_layernorm"]
    flags += ["--apply_layernorm_1p", "--scale_embeddings", "--mlp_activation=gelu_tanh"]
    model = resolved(*SIZES, *flags).model
    assert (model.parallel_attn, model.parallel_layernorm, model.sliding_window_size) == (True, True, 8)
    assert (model.qk_layernorm, model.apply_layernorm_1p, model.scale_embeddings) == (True, True, True)
    assert model.mlp_activation == "gelu_tanh"
    assert resolved(*SIZES, "--use_post_ln").model.use_post_ln


def test_what_a_family_sets_stands_where_the_sizes_are_given_one_by_one() -> None:
    model = resolved(*SIZES, "--model_name=gemma", "--num_attention_heads_kv=1").model
    assert model.kv_channels == 16  # a size, and not the family's
    assert {name: getattr(model, name) for name in family_defaults("gemma")} == family_defaults("gemma")


def test_a_window_of_nothing_is_refused_with_the_flag_that_asks_for_it() -> None:
    with pytest.raises(ConfigError, match=r"^--sliding_window_size 0 leaves a token nothing to attend to; use 1 or"):
        resolved(*SIZES, "--sliding_window_size=0")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--data_type=instruction",
            "--data_type instruction is about other samples: a BERT trains on pairs of texts; drop it.",
        ),
        (
            "--reset_position_ids",
            "--reset_position_ids is about other samples: a BERT trains on pairs of texts; drop it.",
        ),
        (
            "--reset_attention_mask",
            "--reset_attention_mask is about other samples: a BERT trains on pairs of texts; drop it.",
        ),
        ("--eod_mask_loss", "--eod_mask_loss is about other samples: a BERT trains on pairs of texts; drop it."),
        ("--fim_rate=0.5", "--fim_rate 0.5 is about other samples: a BERT trains on pairs of texts; drop it."),
        ("--fim_spm_rate=0.4", "--fim_spm_rate 0.4 is about other samples: a BERT trains on pairs of texts; drop it."),
        (
            "--seq_length=4",
            "--seq_length 4 has no room: a BERT trains on pairs of texts, at least one token of each beside [CLS] and "
            "two [SEP]; use 5 or more.",
        ),
    ],
)
def test_a_bert_refuses_what_is_about_other_samples(flag: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*SIZES, "--model_name=bert", flag)
    assert str(caught.value) == message
    resolved(*SIZES, "--model_name=bert", "--seq_length=5", "--mask_prob=0.2", "--short_seq_prob=0")


@pytest.mark.parametrize(
    ("flags", "what"),
    [(["--fim_tokens", "<a>", "<b>", "<c>"], "--fim_tokens <a> <b> <c>"), (["--fim_spm_rate=0"], "--fim_spm_rate 0")],
)
def test_ways_to_fill_in_the_middle_need_middles(flags: list[str], what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*SIZES, *flags)
    assert str(caught.value) == (
        f"{what} says how documents are rearranged, and without --fim_rate none is; give --fim_rate 0.5, say, "
        "or drop it."
    )
    resolved(*SIZES, "--fim_rate=0.5", *flags)


@pytest.mark.parametrize("flag", ["mask_prob", "short_seq_prob"])
def test_other_models_have_no_hidden_tokens(flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*SIZES, f"--{flag}=0.2")
    assert str(caught.value) == f"--{flag} 0.2 is about a BERT's samples; give --model_name bert, or drop it."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mask_prob=0", "--mask_prob 0 is no share of a text; use 0.15, say, or leave it out."),
        ("--mask_prob=1", "--mask_prob 1 is no share of a text; use 0.15, say, or leave it out."),
        ("--short_seq_prob=1.5", "--short_seq_prob 1.5 is no probability; use 0 to 1."),
    ],
)
def test_shares_outside_of_0_to_1_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*SIZES, "--model_name=bert", flags)
    assert str(caught.value) == message


def test_fields_without_a_flag_survive_a_yaml_file(tmp_path: Path) -> None:
    run = resolved(*SIZES, "--model_name=bert")
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    assert resolve(parse_run(["--config", str(tmp_path / "run.yaml")]), 1, tokenizer_vocab_size=100) == run
