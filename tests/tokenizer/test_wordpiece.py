from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import TokenizerError
from megatron.tokenizer.wordpiece import BertWordPieceCase, BertWordPieceLowerCase
from tiny_tokenizers import TEXT, write_wordpiece

TEXTS = [TEXT, "Ünïcode café, don't! 漢字 [MASK]", "", " \t\n", "unaffable" * 30]


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wordpiece(Path(), tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize(("kind", "lowercase"), [(BertWordPieceCase, False), (BertWordPieceLowerCase, True)])
def test_ids_are_those_of_transformers(vocab_file, kind, lowercase):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizerFast.from_pretrained(vocab_file.parent, do_lower_case=lowercase)
    for text in TEXTS:
        text = text.replace("[MASK]", "mask")  # which is a token to transformers, and text to us
        assert kind(vocab_file).encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_the_ids_of_the_roles_are_those_of_the_file(vocab_file):
    tokenizer = BertWordPieceLowerCase(vocab_file)
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 2, 3, 4)
    assert tokenizer.bos is tokenizer.eos is tokenizer.eod is None
    assert tokenizer.vocab_size == len(vocab_file.read_text().splitlines())


def test_a_mask_that_a_text_spells_out_is_text_unless_asked_for(vocab_file):
    assert 4 not in BertWordPieceCase(vocab_file).encode("a [MASK] b")
    assert 4 in BertWordPieceCase(vocab_file, parse_special=True).encode("a [MASK] b")


def test_the_two_kinds_are_not_the_same_tokenizer(vocab_file):
    assert BertWordPieceCase(vocab_file).identity != BertWordPieceLowerCase(vocab_file).identity


def test_files_that_are_missing_or_of_something_else_are_named(tmp_path):
    file = tmp_path / "vocab.txt"
    with pytest.raises(TokenizerError, match=r"cannot read .*vocab\.txt: No such file.*BERT's vocab\.txt"):
        BertWordPieceCase(file)
    file.write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"vocab\.txt is not a vocab\.txt, it is no UTF-8 text"):
        BertWordPieceCase(file)
    file.write_text("[UNK]\n[CLS]\na\n")
    with pytest.raises(TokenizerError, match=r"vocab\.txt has no piece \[SEP\] and so is not BERT's"):
        BertWordPieceCase(file)
