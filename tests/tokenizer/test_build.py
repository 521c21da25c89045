from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError, TokenizerError
from megatron.tokenizer import TokenizerConfig, build_tokenizer, fit_to_vocabulary
from tiny_tokenizers import (
    SENTENCEPIECE_PIECES,
    write_gpt2,
    write_huggingface,
    write_ranks,
    write_sentencepiece,
    write_wordpiece,
)

WITH_ADDITIONS = SENTENCEPIECE_PIECES + 5


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_huggingface(tmp_path_factory.mktemp("huggingface"), eos_token="<|end|>"))


def test_the_kind_of_file_decides_where_no_type_is_given(model_file, hf_folder):
    assert build_tokenizer(TokenizerConfig(vocab_file=model_file)).name == "SentencePieceTokenizer"
    assert build_tokenizer(TokenizerConfig(tokenizer_model=hf_folder)).name == "HuggingFaceTokenizer"
    assert build_tokenizer(TokenizerConfig(vocab_file=f"{hf_folder}/tokenizer.json")).name == "HuggingFaceTokenizer"
    assert build_tokenizer(TokenizerConfig(vocab_size=7)).name == "NullTokenizer"


def test_the_files_in_a_folder_decide_where_no_type_is_given(hf_folder, tmp_path):
    for name, write in {"GPT2BPETokenizer": write_gpt2, "TikTokenizer": write_ranks}.items():
        folder = tmp_path / name
        folder.mkdir()
        write(Path(hf_folder), folder)
        config = TokenizerConfig(tokenizer_model=str(folder), tiktoken_encoding="gpt2" if "Tik" in name else None)
        assert build_tokenizer(config).name == name
    ranks = TokenizerConfig(vocab_file=f"{tmp_path}/TikTokenizer/tokenizer.model", tiktoken_encoding="gpt2")
    assert build_tokenizer(ranks).name == "TikTokenizer"
    named = TokenizerConfig("HuggingFaceTokenizer", f"{tmp_path}/TikTokenizer", tiktoken_encoding=None)
    with pytest.raises(ConfigError, match="ranks and is none of the encodings"):
        build_tokenizer(named)


@pytest.mark.parametrize("name", ["GPT2BPETokenizer", "TikTokenizer", "BertWordPieceCase", "FalconTokenizer"])
def test_every_option_reaches_the_other_types_too(hf_folder, tmp_path, name):
    path = Path(hf_folder)
    if name != "FalconTokenizer":
        path = tmp_path
        {"GPT2BPETokenizer": write_gpt2, "TikTokenizer": write_ranks, "BertWordPieceCase": write_wordpiece}[name](
            Path(hf_folder), path
        )
    options = {"vocab_extra_ids": 1, "vocab_extra_ids_list": ("[a],[b]",)}
    encoding = {"tiktoken_encoding": "gpt2"} if name == "TikTokenizer" else {}
    built = build_tokenizer(TokenizerConfig(name, str(path), **options, **encoding))
    plain = build_tokenizer(TokenizerConfig(name, str(path), **encoding))
    size = plain.vocab_size
    assert built.added_tokens == {"<extra_id_0>": size, "[a]": size + 1, "[b]": size + 2}
    assert size + 2 in built.encode("x[b]") and size not in built.encode("<extra_id_0>")
    parsing = build_tokenizer(TokenizerConfig(name, str(path), parse_special=True, **options, **encoding))
    assert size in parsing.encode("<extra_id_0>")


def test_every_option_reaches_the_tokenizer(model_file, hf_folder):
    options = {"vocab_extra_ids": 1, "vocab_extra_ids_list": ("[a],[b]",), "parse_special": True}
    built = build_tokenizer(TokenizerConfig("SentencePieceTokenizer", model_file, no_new_tokens=True, **options))
    assert list(built.added_tokens) == ["<extra_id_0>", "[a]", "[b]"]
    assert built.encode("</s>") == [built.eos]
    built = build_tokenizer(TokenizerConfig("HuggingFaceTokenizer", hf_folder, **options))
    assert list(built.added_tokens) == ["<extra_id_0>", "[a]", "[b]"]
    assert built.encode("<|end|>") == [built.eos]


def test_a_folder_with_only_a_sentencepiece_model_says_what_it_uses(model_file, caplog):
    config = TokenizerConfig("HuggingFaceTokenizer", str(Path(model_file).parent))
    assert build_tokenizer(config).identity == build_tokenizer(TokenizerConfig(vocab_file=model_file)).identity
    assert "has no tokenizer.json" in caplog.text and "tokenizer.model is used instead" in caplog.text


def test_a_folder_serves_the_sentencepiece_type_too(model_file):
    built = build_tokenizer(TokenizerConfig("SentencePieceTokenizer", str(Path(model_file).parent)))
    assert built.identity == build_tokenizer(TokenizerConfig(vocab_file=model_file)).identity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no tokenizer is given; .*--tokenizer_model, or .*NullTokenizer --vocab_size N"),
        ({"tokenizer_type": "GPT2BPETokenizer"}, "GPT2BPETokenizer needs its file; give --tokenizer_model PATH"),
        ({"vocab_file": "vocab.txt"}, "vocab.txt may be BERT's .* --tokenizer_type BertWordPieceLowerCase or Bert"),
        (
            {"vocab_file": "a.json", "tiktoken_encoding": "gpt2"},
            "--tiktoken_encoding gpt2 is for TikTokenizer, and this is a HuggingFaceTokenizer; drop one",
        ),
        ({"tokenizer_type": "Sentencepiece"}, "Sentencepiece is unknown; use one of SentencePieceTokenizer, Hugging"),
        ({"tokenizer_type": "SentencePieceTokenizer"}, "needs its file; give --tokenizer_model PATH"),
        (
            {"tokenizer_type": "NullTokenizer"},
            "NullTokenizer needs the number of ids .*, not None; give --vocab_size N",
        ),
        ({"vocab_size": 0}, "not 0; give --vocab_size N"),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 5, "vocab_file": "x"}, "exactly --vocab_size 5 ids .* drop"),
        ({"vocab_size": 5, "vocab_extra_ids_list": ("a",)}, "exactly --vocab_size 5 ids .* drop"),
        ({"vocab_file": "x.model", "vocab_size": 5}, "--vocab_size 5 is for NullTokenizer; .* drop it"),
    ],
)
def test_flags_that_name_no_tokenizer_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(TokenizerConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_extra_ids_list": ("[a],,[b]",)}, r"--vocab_extra_ids_list '\[a\],,\[b\]' has an empty token"),
        ({"vocab_extra_ids_list": ("[a],[b],[a]",)}, r"names '\[a\]' more than once"),
        ({"vocab_extra_ids": -1}, "--vocab_extra_ids -1 is negative"),
        ({"merge_file": "merges.txt"}, "--merge_file merges.txt needs its vocab.json; give --vocab_file too"),
        (
            {"merge_file": "m.txt", "vocab_file": "v", "tokenizer_type": "FalconTokenizer"},
            "--merge_file m.txt is for GPT2BPETokenizer, and --tokenizer_type is FalconTokenizer; drop one of them",
        ),
        ({"vocab_file": "a", "tokenizer_model": "b"}, "--tokenizer_model b and --vocab_file a differ"),
    ],
)
def test_flags_that_contradict_themselves_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig(**options)


def test_a_list_and_a_comma_separated_string_of_tokens_mean_the_same():
    assert TokenizerConfig(vocab_extra_ids_list=("a,b",)) == TokenizerConfig(vocab_extra_ids_list=("a", "b"))


def test_a_tokenizer_whose_ids_all_have_rows_is_left_alone(model_file, caplog):
    config = TokenizerConfig(vocab_file=model_file)
    for num_rows in (WITH_ADDITIONS, 1000):
        assert fit_to_vocabulary(config, num_rows).identity == build_tokenizer(config).identity
    assert not caplog.records


def test_default_additions_are_left_out_with_a_message_when_only_the_model_has_rows(model_file, caplog):
    caplog.set_level(logging.WARNING)
    fitted = fit_to_vocabulary(TokenizerConfig(vocab_file=model_file), SENTENCEPIECE_PIECES)
    assert fitted.vocab_size == SENTENCEPIECE_PIECES
    assert fitted.eod == fitted.pad == fitted.eos
    assert "without <CLS>, <SEP>, <EOD>, <MASK> and <PAD>" in caplog.text
    assert "--no_new_tokens" in caplog.text


def test_tokens_of_the_list_without_a_row_name_the_command_that_adds_rows(model_file, hf_folder):
    tokens = ("[formula],[/formula]",)
    with pytest.raises(
        TokenizerError,
        match=r"--vocab_extra_ids_list: token '\[formula\]' has id 325, but the checkpoint has 320 embedding rows; "
        r"add rows with tools/checkpoint_util.py --true_vocab_size 327 \(322 with --no_new_tokens\)",
    ):
        fit_to_vocabulary(TokenizerConfig(vocab_file=model_file, vocab_extra_ids_list=tokens), SENTENCEPIECE_PIECES)
    with pytest.raises(TokenizerError, match=r"token '\[formula\]' has id 320, .*320 .*--true_vocab_size 322, or"):
        config = TokenizerConfig(vocab_file=model_file, vocab_extra_ids_list=tokens, no_new_tokens=True)
        fit_to_vocabulary(config, SENTENCEPIECE_PIECES)
    with pytest.raises(TokenizerError, match=r"token '\[/formula\]' has id 303, .*303 .*--true_vocab_size 304, or"):
        fit_to_vocabulary(TokenizerConfig(tokenizer_model=hf_folder, vocab_extra_ids_list=tokens), 303)


def test_numbered_tokens_without_a_row_name_their_own_flag(hf_folder):
    with pytest.raises(
        TokenizerError, match=r"--vocab_extra_ids: token '<extra_id_0>' has id 302, .*--true_vocab_size"
    ):
        fit_to_vocabulary(TokenizerConfig(tokenizer_model=hf_folder, vocab_extra_ids=1), 302)


@pytest.mark.parametrize("num_rows", [SENTENCEPIECE_PIECES - 1, SENTENCEPIECE_PIECES + 1])
def test_another_number_of_rows_is_no_match_for_the_default_additions(model_file, num_rows):
    with pytest.raises(TokenizerError, match=f"ids up to 324, but the checkpoint has {num_rows} .* checkpoint's own"):
        fit_to_vocabulary(TokenizerConfig(vocab_file=model_file), num_rows)


def test_ids_beyond_the_rows_of_another_tokenizer_are_an_error(hf_folder):
    with pytest.raises(TokenizerError, match="NullTokenizer has ids up to 9, but the checkpoint has 5 embedding rows"):
        fit_to_vocabulary(TokenizerConfig(vocab_size=10), 5)
    with pytest.raises(TokenizerError, match=r"HuggingFaceTokenizer has ids up to 301, .* --true_vocab_size 302"):
        fit_to_vocabulary(TokenizerConfig(tokenizer_model=hf_folder), 300)


def test_tokenizers_need_neither_torch_nor_transformers():
    check = (
        "import sys, megatron.tokenizer, megatron.data.preprocess; print({'torch', 'transformers'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
