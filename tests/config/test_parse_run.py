"""The command line and the YAML file of a run: what is accepted, warned of, and refused."""

import argparse
import dataclasses
import shlex

import pytest

from megatron.config import parse_run
from megatron.config.original_flags import ACCEPTED, REFUSED
from megatron.config.owners import MODEL, OWNERS, make_parser
from megatron.errors import ConfigError
from megatron.model.config import RopeScaling

FAQ_LLAMA2 = shlex.split("""--model_name llama2
    --tensor_model_parallel_size 2 --pipeline_model_parallel_size 2 --bf16
    --train_iters 500 --adam_beta1 0.9 --adam_beta2 0.95 --adam_eps 1e-5
    --lr_decay_style cosine --lr_warmup_iters 50 --lr 3e-4 --min_lr 1e-6 --weight_decay 0.1
    --micro_batch_size 5 --global_batch_size 1000
    --use_flash_attn --sequence_parallel --recompute_granularity selective
    --load /models/megatron-llama --use_checkpoint_args --vocab_file /models/tokenizer.model
    --log_interval 1 --data_path /data/tokens --tokenizer_type SentencePieceTokenizer""")

ROPE_FIELDS = "type, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings"


def flags_of_a_run() -> list[argparse.Action]:
    return [action for action in make_parser()._actions if action.dest != "help"]


def message(typed: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run(typed)
    return str(caught.value)


def test_the_llama_2_command_of_the_faq_parses_to_exactly_what_it_says():
    typed = parse_run(FAQ_LLAMA2)
    assert typed.section("parallel") == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "recompute_granularity": "selective",
    }
    assert typed.section("optimizer") == {
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-5,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 50,
        "lr": 3e-4,
        "min_lr": 1e-6,
        "weight_decay": 0.1,
    }
    assert typed.section("training") == {
        "model_name": "llama2",
        "bf16": True,
        "train_iters": 500,
        "micro_batch_size": 5,
        "global_batch_size": 1000,
        "use_flash_attn": True,
    }
    assert typed.section("checkpoint") == {"load": "/models/megatron-llama", "use_checkpoint_args": True}
    assert typed.section("tokenizer") == {
        "vocab_file": "/models/tokenizer.model",
        "tokenizer_type": "SentencePieceTokenizer",
    }
    assert typed.section("data") == {"data_path": ("/data/tokens",)}
    assert typed.section("logging") == {"log_interval": 1}
    assert typed.section("model") == {}


def test_the_known_typo_of_the_faq_is_named():
    index = FAQ_LLAMA2.index("cosine")
    assert message([*FAQ_LLAMA2[: index + 1], "5", *FAQ_LLAMA2[index + 1 :]]) == (
        "'5' after '--lr_decay_style cosine' belongs to no flag: '--lr_decay_style cosine' is complete without it; "
        "remove '5'."
    )


def test_hyphens_mean_the_same():
    hyphens = [token.replace("_", "-") if token.startswith("--") else token for token in FAQ_LLAMA2]
    assert parse_run(hyphens) == parse_run(FAQ_LLAMA2)


def test_every_flag_is_documented():
    assert all(action.help for action in flags_of_a_run())


def test_every_field_with_help_is_a_flag_and_no_two_owners_share_one():
    dests = [action.dest for action in flags_of_a_run()]
    names = [
        field.name for owner in OWNERS for field in owner.flag_fields() if (owner, field.name) != (MODEL, "vocab_size")
    ]
    assert len(names) == len(set(names))
    for owner in OWNERS:
        for field in owner.flag_fields():
            assert owner.dest(field.name) in dests or (owner, field.name) == (MODEL, "vocab_size")


def test_help_has_a_group_for_each_owner_and_shows_defaults():
    text = " ".join(make_parser().format_help().split())
    for owner in OWNERS:
        assert owner.title in text
    assert "--seed N decides initial weights, sample order and dropout (default: 1234)" in text
    assert "--no_tie_embed_logits do not share the embedding matrix" in text
    assert "DDP_impl" not in text


def test_a_flag_is_either_here_accepted_or_refused():
    generated = {name for name in make_parser().flag_names() if name not in ACCEPTED}
    assert not generated & set(REFUSED)
    assert not set(ACCEPTED) & set(REFUSED)


def test_flags_without_effect_give_one_warning_that_names_what_replaces_each(capsys):
    typed = parse_run(["--DDP_impl", "local", "--no-masked-softmax-fusion", "--distributed_backend=nccl", "--lr", "1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no effect here: --DDP_impl (data parallelism is chosen with --zero_stage); ")
    assert "--no_masked_softmax_fusion (PyTorch chooses the fused kernel" in line
    assert "--distributed_backend (--device chooses" in line
    assert typed.section("optimizer") == {"lr": 1.0}


def test_a_run_without_such_flags_gives_no_warning(capsys):
    parse_run(FAQ_LLAMA2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_every_accepted_flag_is_parsed(name, capsys):
    accepted = ACCEPTED[name]
    value = [accepted.harmless[0] if accepted.harmless else "1"] if accepted.takes_value else []
    parse_run([f"--{name}", *value])
    assert f"--{name} ({accepted.instead})" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(name for name, accepted in ACCEPTED.items() if accepted.harmless))
def test_a_value_that_would_matter_is_refused(name):
    assert message([f"--{name}", "other"]) == f"--{name} other is not available: {ACCEPTED[name].otherwise}."


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_every_refused_flag_says_why_and_what_to_do(name):
    assert message([f"--{name}", "1"]) == f"--{name} {REFUSED[name]}"
    assert REFUSED[name].endswith(".") and (";" in REFUSED[name] or ". " in REFUSED[name])


def test_an_unknown_flag_names_the_nearest_one():
    assert message(["--micro_batchsize", "1"]).endswith("did you mean --micro_batch_size?")


def test_other_spellings_set_the_fields_they_stand_for():
    typed = parse_run(["--use_bias", "--rope_scaling_factor=4", "--encoder_num_layers=3", "--encoder_seq_length=8"])
    assert typed.section("model") == {
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "rope_scaling": RopeScaling("linear", 4.0),
        "num_layers": 3,
    }
    assert typed.section("data") == {"seq_length": 8}
    assert parse_run(["--recompute_activations"]).section("parallel") == {"recompute_granularity": "selective"}
    assert parse_run(["--rope_scaling_factor", "1"]).section("model") == {"rope_scaling": None}


def test_a_rope_scaling_factor_below_1_is_refused():
    assert message(["--rope_scaling_factor", "0.5"]) == (
        "--rope_scaling_factor 0.5 would shorten the context; use 1 or more."
    )


def test_switches_that_are_on_are_switched_off_by_no():
    assert parse_run(["--no_tie_embed_logits"]).section("model") == {"tie_embed_logits": False}
    assert parse_run(["--no_save_optim", "--no-load-optim"]).section("checkpoint") == {
        "save_optim": False,
        "load_optim": False,
    }


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_yaml_file_has_the_same_flags_and_the_command_line_wins(yaml_file):
    path = yaml_file(
        "lr: 3e-4\nmin_lr: 0\nmicro-batch-size: 2\nbf16: true\nsize: 70\ndata_path: tokens\nvocab_size: 11\n"
        "use_bias: true\nno_tie_embed_logits: true\nzero_stage: 2\n"
        "model:\n  use_rms_norm: false\n  glu_activation:\n  rope_scaling: {type: llama3, factor: 8}\n"
    )
    typed = parse_run(["--config", path, "--zero_stage", "3"])
    assert typed.section("optimizer") == {"lr": 3e-4, "min_lr": 0.0}
    assert typed.section("training") == {"micro_batch_size": 2, "bf16": True, "size": "70"}
    assert typed.section("data") == {"data_path": ("tokens",)}
    assert typed.section("tokenizer") == {"vocab_size": 11}
    assert typed.section("parallel") == {"zero_stage": 3}
    assert typed.section("model") == {
        "use_rms_norm": False,
        "glu_activation": None,
        "rope_scaling": RopeScaling("llama3", 8.0),
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "tie_embed_logits": False,
    }


def test_flags_without_effect_warn_from_a_yaml_file_too(yaml_file, capsys):
    parse_run(["--config", yaml_file("DDP_impl: local\nno_load_rng: true\nno_save_rng: false\n"), "--no_load_rng"])
    err = capsys.readouterr().err
    assert err.count("--no_load_rng") == 1 and "--DDP_impl" in err and "--no_save_rng" not in err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("micro_batchsize: 1", "micro_batchsize is not a flag of this program; did you mean micro_batch_size?"),
        ("paralel: {}", "paralel is not a flag of this program; did you mean parallel?"),
        ("model: {num_layer: 1}", "num_layer is not a flag of this program; did you mean num_layers?"),
        ("fp16: true", f"fp16 {REFUSED['fp16']}"),
        ("model: 3", "model: 3 is not a section; write its fields below it, indented."),
        ("micro_batch_size: many", "micro_batch_size: 'many' is not an integer; give one."),
        ("micro_batch_size: true", "micro_batch_size: True is not an integer; give one."),
        ("micro_batch_size: 1.5", "micro_batch_size: 1.5 is not an integer; give one."),
        ("bf16: 1", "bf16: 1 is not true or false; give one."),
        ("lr: null", "lr: None is not a number; give one."),
        ("zero_stage: 4", "zero_stage: 4 is not one of its choices; use 0, 1, 2, 3."),
        ("use_bias: [1]", "use_bias: [1] is not a single value; give one."),
        ("model: {rope_scaling: 2}", f"rope_scaling: 2 is not a set of values; give {ROPE_FIELDS}."),
        (
            "model: {rope_scaling: {kind: x}}",
            f"rope_scaling: {{'kind': 'x'}} is not a set of values; give {ROPE_FIELDS}.",
        ),
    ],
)
def test_a_mistake_in_a_yaml_file_names_file_key_and_remedy(text, reason, yaml_file):
    path = yaml_file(text)
    assert message(["--config", path]) == f"{path}: {reason}"


def test_a_file_that_is_no_yaml_file_is_named(yaml_file, tmp_path):
    missing = tmp_path / "none.yaml"
    assert message(["--config", str(missing)]) == (
        f"--config {missing} cannot be read (No such file or directory); check the path."
    )
    assert message(["--config", yaml_file("a: [1")]).endswith("write one 'flag: value' a line.")
    assert message(["--config", yaml_file("- a")]).endswith(
        "holds no flags, but ['a']; write one 'flag: value' a line."
    )
    assert parse_run(["--config", yaml_file("")]) == parse_run([])


def test_owners_are_frozen():
    assert all(
        dataclasses.fields(owner.config_type) and owner.config_type.__dataclass_params__.frozen for owner in OWNERS
    )
