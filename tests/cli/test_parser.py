"""Both spellings of a flag, and one line for every way to mistype."""

import argparse

import pytest

from megatron.cli import ArgumentParser
from megatron.errors import ConfigError


def make_parser(**kwargs) -> ArgumentParser:
    parser = ArgumentParser(prog="train", **kwargs)
    parser.add_argument("--micro_batch_size", type=int, default=3, help="samples at once")
    parser.add_argument("--model-path", help="a folder")
    parser.add_argument("--lr", type=float, default=argparse.SUPPRESS, help="learning rate")
    parser.add_argument("--lr_decay_style", choices=["cosine", "linear"], help="shape")
    parser.add_argument("--bf16", action="store_true", help="half the bytes")
    parser.add_argument("--files", nargs="+", help="some files")
    return parser


@pytest.mark.parametrize("flag", ["--micro_batch_size", "--micro-batch-size", "--micro_batch-size"])
def test_underscores_and_hyphens_are_the_same_flag(flag):
    assert make_parser().parse_args([flag, "4"]).micro_batch_size == 4
    assert make_parser().parse_args([f"{flag}=4"]).micro_batch_size == 4


def test_a_flag_added_with_hyphens_is_found_with_underscores_and_keeps_the_hyphens_of_its_value():
    assert make_parser().parse_args(["--model_path=/a-b/c_d"]).model_path == "/a-b/c_d"


def test_an_error_uses_the_spelling_that_help_shows():
    with pytest.raises(ConfigError, match=r"^--micro_batch_size x is not an integer; give one; --help"):
        make_parser().parse_args(["--micro-batch-size", "x"])


def test_negative_numbers_in_any_notation_are_values():
    assert make_parser().parse_args(["--lr", "-1e-4"]).lr == -1e-4


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--micro_batch_sise 4", "--micro_batch_sise is not a flag of this program; did you mean --micro_batch_size?"),
        ("--micro 4", "--micro is not a flag of this program; did you mean --micro_batch_size?"),
        ("--modelpath=x", "--modelpath is not a flag of this program; did you mean --model_path?"),
        (
            "--quux 4",
            "--quux is not a flag of this program, and none is spelled like it; --help lists them all.",
        ),
        ("-b 4", "-b is not a flag of this program: flags begin with two dashes; --help lists them all."),
        (
            "--nproc_per_node 4",
            "--nproc_per_node is an option of torchrun, not of this program; put it before the script's name.",
        ),
        ("--lr fast", "--lr fast is not a number; give one; --help says what it takes."),
        ("--lr", "--lr: expected one argument; --help says what each flag takes."),
        (
            "--lr_decay_style cosin",
            "--lr_decay_style cosin is not one of its choices (did you mean cosine?); use cosine, linear.",
        ),
        ("--lr_decay_style 5", "--lr_decay_style 5 is not one of its choices; use cosine, linear."),
        ("5 --bf16", "'5' belongs to no flag; remove it, or write the flag before it."),
    ],
)
def test_each_mistake_is_one_line_with_value_reason_and_remedy(typed, message):
    with pytest.raises(ConfigError) as caught:
        make_parser().parse_args(typed.split())
    assert str(caught.value) == message


def test_a_value_after_a_complete_flag_is_named_with_the_flag():
    with pytest.raises(ConfigError) as caught:
        make_parser().parse_args(["--bf16", "--lr_decay_style", "cosine", "5", "--lr", "1"])
    assert str(caught.value) == (
        "'5' after '--lr_decay_style cosine' belongs to no flag: '--lr_decay_style cosine' is complete without it; "
        "remove '5'."
    )


def test_a_stray_value_is_not_mistaken_for_the_same_value_of_another_flag():
    for before in (["--micro_batch_size", "5"], ["--micro-batch-size", "5"]):
        with pytest.raises(ConfigError, match="^'5' after '--lr_decay_style cosine' belongs to no flag"):
            make_parser().parse_args([*before, "--lr_decay_style", "cosine", "5"])


def test_a_refused_flag_is_answered_with_its_own_reason_in_both_spellings():
    parser = make_parser(refused={"use_post_ln": "is gone; leave it out."})
    for flag in ("--use_post_ln", "--use-post-ln"):
        with pytest.raises(ConfigError, match=f"^{flag} is gone; leave it out.$"):
            parser.parse_args([flag])


def test_a_missing_required_flag_is_named():
    parser = make_parser()
    parser.add_argument("--input", required=True, help="text")
    with pytest.raises(ConfigError, match="the following arguments are required: --input"):
        parser.parse_args([])


def test_a_converter_s_own_reason_is_kept():
    def even(text: str) -> int:
        if int(text) % 2:
            raise argparse.ArgumentTypeError("odd")
        return int(text)

    parser = make_parser()
    parser.add_argument("--pairs", type=even, help="an even number")
    with pytest.raises(ConfigError, match=r"^--pairs 3 cannot be read: odd; --help says what it takes.$"):
        parser.parse_args(["--pairs", "3"])


def test_help_shows_the_defaults_that_say_something():
    text = make_parser().format_help()
    assert "samples at once (default: 3)" in text
    assert "None" not in text
    assert "False" not in text


def test_subcommands_take_both_spellings_and_name_unknown_flags():
    parser = ArgumentParser()
    sub = parser.add_subparsers(dest="command", required=True).add_parser("merge")
    sub.add_argument("--load_dir", help="from")
    assert parser.parse_args(["merge", "--load-dir", "x"]).load_dir == "x"
    with pytest.raises(ConfigError, match="--weird is not a flag"):
        parser.parse_args(["merge", "--weird"])
