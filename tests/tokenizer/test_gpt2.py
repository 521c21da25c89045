from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import TokenizerError
from megatron.tokenizer.gpt2 import GPT2BPETokenizer
from megatron.tokenizer.huggingface import HuggingFaceTokenizer
from tiny_tokenizers import TEXT, write_gpt2, write_huggingface


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="module")
def folder(huggingface: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(huggingface, tmp_path_factory.mktemp("gpt2"))


def _build(folder: Path, **options: object) -> GPT2BPETokenizer:
    return GPT2BPETokenizer(folder / "vocab.json", folder / "merges.txt", **options)


@given(text=st.sampled_from([TEXT, "don't  \n é 漢", ""]) | st.text())
def test_ids_are_those_of_the_same_model_as_a_tokenizer_json(folder, huggingface, text):
    ours = _build(folder)
    assert ours.encode(text) == HuggingFaceTokenizer(huggingface).encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_ids_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    assert _build(folder).encode(TEXT) == theirs(TEXT)["input_ids"]


def test_end_of_text_ends_documents_and_is_text_where_a_text_says_it(folder):
    tokenizer = _build(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (300, 300, 300, None)
    assert tokenizer.vocab_size == 301
    assert 300 not in tokenizer.encode("a<|endoftext|>b")
    assert _build(folder, parse_special=True).encode("<|endoftext|>") == [300]
    assert _build(folder, extra_tokens=["<|endoftext|>"]).encode("<|endoftext|>") == [300]


def test_the_identity_changes_with_either_file(folder, huggingface, tmp_path):
    write_gpt2(huggingface, tmp_path)
    assert _build(tmp_path).identity == _build(folder).identity
    merges = (tmp_path / "merges.txt").read_text().splitlines(keepends=True)
    (tmp_path / "merges.txt").write_text("".join(merges[:-1]))
    assert _build(tmp_path).identity != _build(folder).identity


def test_files_that_are_missing_or_of_something_else_are_named(folder, tmp_path):
    with pytest.raises(TokenizerError, match=r"cannot read .*merges\.txt: No such file.*--vocab_file .* --merge_file"):
        GPT2BPETokenizer(folder / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text("[1]")
    with pytest.raises(TokenizerError, match=r"are no vocabulary and merges of one byte-level BPE \(.*\); copy both"):
        GPT2BPETokenizer(tmp_path / "vocab.json", folder / "merges.txt")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match=r"vocab\.json has no <\|endoftext\|>, which ends documents"):
        GPT2BPETokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
