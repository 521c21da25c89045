from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import TokenizerError
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from tiny_tokenizers import SENTENCEPIECE_PIECES, TEXT, write_sentencepiece


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def raw(model_file: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_file))


def _model_with(folder: Path, **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(folder / "other"),
        vocab_size=SENTENCEPIECE_PIECES,
        byte_fallback=True,
        minloglevel=2,
        model_type="bpe",
        **options,
    )
    return folder / "other.model"


def test_ids_are_those_of_the_library(model_file, raw):
    tokenizer = SentencePieceTokenizer(model_file)
    assert tokenizer.encode(TEXT) == raw.encode(TEXT)


def test_added_tokens_follow_the_pieces_in_the_original_order(model_file):
    tokenizer = SentencePieceTokenizer(model_file, vocab_extra_ids=2, extra_tokens=["[formula]", "[/formula]"])
    order = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>", "[formula]", "[/formula]"]
    assert tokenizer.added_tokens == {token: SENTENCEPIECE_PIECES + i for i, token in enumerate(order)}
    assert tokenizer.vocab_size == SENTENCEPIECE_PIECES + len(order)
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert tokenizer.eod == tokenizer.added_tokens["<EOD>"]
    assert tokenizer.pad == tokenizer.added_tokens["<PAD>"]


def test_without_new_tokens_documents_end_and_are_padded_with_eos(model_file):
    tokenizer = SentencePieceTokenizer(model_file, no_new_tokens=True, vocab_extra_ids=1, extra_tokens=["[formula]"])
    assert tokenizer.added_tokens == {"<extra_id_0>": SENTENCEPIECE_PIECES, "[formula]": SENTENCEPIECE_PIECES + 1}
    assert tokenizer.eod == tokenizer.pad == tokenizer.eos == 2


def test_a_padding_piece_of_the_model_is_the_padding_token(tmp_path):
    tokenizer = SentencePieceTokenizer(_model_with(tmp_path, pad_id=3))
    assert tokenizer.pad == 3
    assert "<PAD>" not in tokenizer.added_tokens
    assert tokenizer.vocab_size == SENTENCEPIECE_PIECES + 4


def test_a_token_that_is_a_piece_already_keeps_its_id(tmp_path):
    model_file = _model_with(tmp_path, user_defined_symbols=["[formula]"])
    tokenizer = SentencePieceTokenizer(model_file, no_new_tokens=True, extra_tokens=["[formula]"])
    assert tokenizer.vocab_size == SENTENCEPIECE_PIECES
    assert tokenizer.encode("[formula]") == [tokenizer.added_tokens["[formula]"]]


def test_a_model_without_eos_has_none(tmp_path):
    tokenizer = SentencePieceTokenizer(_model_with(tmp_path, eos_id=-1), no_new_tokens=True)
    assert tokenizer.eos is tokenizer.eod is tokenizer.pad is None


@pytest.mark.parametrize("token", ["<s>", "</s>", "<unk>", "<CLS>", "<EOD>", "<extra_id_0>"])
def test_special_tokens_that_a_text_spells_out_stay_text(model_file, raw, token):
    tokenizer = SentencePieceTokenizer(model_file, vocab_extra_ids=1, extra_tokens=["[formula]"])
    text = f"a {token} b"
    assert tokenizer.encode(text) == raw.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_parse_special_turns_spelled_out_special_tokens_into_their_ids(model_file, raw):
    tokenizer = SentencePieceTokenizer(model_file, parse_special=True)
    expected = [*raw.encode("a"), tokenizer.eos, *raw.encode("b"), tokenizer.eod]
    assert tokenizer.encode("a</s>b<EOD>") == expected


def test_tokens_of_the_list_are_matched_and_the_text_between_is_encoded_on_its_own(model_file, raw):
    tokenizer = SentencePieceTokenizer(model_file, extra_tokens=["[formula]", "[/formula]"])
    opening, closing = tokenizer.added_tokens["[formula]"], tokenizer.added_tokens["[/formula]"]
    expected = [*raw.encode("so "), opening, *raw.encode("x + y"), closing, *raw.encode(" is")]
    assert tokenizer.encode("so [formula]x + y[/formula] is") == expected


def test_the_longest_token_matches_where_one_is_the_start_of_another(model_file):
    tokenizer = SentencePieceTokenizer(model_file, extra_tokens=["<f", "<f>"])
    assert tokenizer.encode("<f>") == [tokenizer.added_tokens["<f>"]]


@given(st.lists(st.sampled_from(["[f]", "</s>", " ", "  ", "\n", "a", "Bennet", "é", "漢", "\0", "7"])).map("".join))
def test_decoding_gives_the_text_back_unchanged(model_file, text):
    tokenizer = SentencePieceTokenizer(model_file, extra_tokens=["[f]"])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_written_out_when_decoded(model_file, raw):
    tokenizer = SentencePieceTokenizer(model_file)
    assert tokenizer.decode([1, *raw.encode("a"), 2, tokenizer.eod]) == "<s>a</s><EOD>"


def test_a_batch_equals_its_texts_for_any_number_of_threads(model_file):
    tokenizer = SentencePieceTokenizer(model_file, extra_tokens=["[f]"])
    texts = [TEXT[:n] + "[f]" * (n % 2) for n in range(40)]
    for num_threads in (1, 2, 5):
        batch = tokenizer.encode_batch(texts, num_threads)
        assert all(ids.dtype == np.int32 for ids in batch)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


def test_the_identity_changes_with_everything_that_changes_ids(model_file, tmp_path):
    variants = [
        SentencePieceTokenizer(model_file),
        SentencePieceTokenizer(model_file, no_new_tokens=True),
        SentencePieceTokenizer(model_file, extra_tokens=["a", "b"]),
        SentencePieceTokenizer(model_file, extra_tokens=["b", "a"]),
        SentencePieceTokenizer(model_file, parse_special=True),
        SentencePieceTokenizer(_model_with(tmp_path)),
    ]
    assert len({tokenizer.identity.fingerprint for tokenizer in variants}) == len(variants)
    again = SentencePieceTokenizer(model_file)
    assert again.identity == variants[0].identity
    assert again.identity.fingerprint == variants[0].identity.fingerprint


def test_an_id_outside_the_vocabulary_is_not_decoded(model_file):
    with pytest.raises(TokenizerError, match="id 325 is outside the 325 ids of the SentencePieceTokenizer"):
        SentencePieceTokenizer(model_file).decode([1, 325])


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"cannot read .*none\.model: No such file.*--tokenizer_model"):
        SentencePieceTokenizer(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"{}" * 100, b"no model"])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "wrong.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"wrong\.model is not a SentencePiece model; .*HuggingFaceTokenizer"):
        SentencePieceTokenizer(tmp_path / "wrong.model")


def test_an_empty_model_is_refused(tmp_path):
    (tmp_path / "empty.model").touch()
    with pytest.raises(TokenizerError, match=r"empty\.model is empty"):
        SentencePieceTokenizer(tmp_path / "empty.model")
