from __future__ import annotations

import pytest
import sentencepiece

from megatron.errors import TokenizerError
from megatron.tokenizer.train import MAX_LINE_CHARACTERS, train_sentencepiece
from tiny_tokenizers import TEXT


@pytest.mark.parametrize(("model_type", "vocab_size"), [("bpe", 320), ("unigram", 310)])
def test_a_trained_model_gives_back_any_text_unchanged(tmp_path, model_type, vocab_size):
    model_file = tmp_path / "new" / "tokenizer.model"
    train_sentencepiece([TEXT], model_file, vocab_size=vocab_size, model_type=model_type)
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in (TEXT, "  two  blanks \n\ttab", "ﬁ ① é 漢字 \U0001f600"):
        assert model.decode(model.encode(text)) == text
    assert model.get_piece_size() == vocab_size
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)


def test_digits_stand_alone(tmp_path):
    train_sentencepiece(["1813 1813 1813 " * 50 + TEXT], tmp_path / "t.model", vocab_size=320)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert model.encode("1813", out_type=str) == ["▁", "1", "8", "1", "3"]


def test_the_report_counts_the_text_that_was_used(tmp_path):
    report = train_sentencepiece(
        [TEXT, "é", "never read"], tmp_path / "t.model", vocab_size=320, max_text_bytes=len(TEXT) + 1
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    num_bytes = len(TEXT) + len("é".encode())
    assert (report.vocab_size, report.num_documents, report.text_bytes) == (320, 2, num_bytes)
    assert report.bytes_per_token == num_bytes / (len(model.encode(TEXT)) + len(model.encode("é")))
    assert TEXT.startswith(report.sample + " ")
    assert "".join(report.sample_pieces).replace("▁", " ") == " " + report.sample


def test_a_long_line_is_learned_from_too(tmp_path):
    long_line = "zyzzyva " * (MAX_LINE_CHARACTERS // 4)
    train_sentencepiece([long_line], tmp_path / "t.model", vocab_size=275)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert model.encode("zyzzyva", out_type=str) == ["▁zyzzyva"]


def test_a_vocabulary_too_large_for_the_text_names_the_largest(tmp_path):
    with pytest.raises(TokenizerError, match=r"--vocab_size 9000 is more pieces than this text has; give at most \d+"):
        train_sentencepiece([TEXT], tmp_path / "t.model", vocab_size=9000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("vocab_size", "smallest"), [(0, 260), (259, 260), (260, 259 + len(set(TEXT) - {"\n"}))])
def test_a_vocabulary_too_small_for_the_characters_names_the_smallest(tmp_path, vocab_size, smallest):
    message = f"--vocab_size {vocab_size} has no room for the 259 basic pieces .* at least {smallest}"
    with pytest.raises(TokenizerError, match=message):
        train_sentencepiece([TEXT], tmp_path / "t.model", vocab_size=vocab_size)


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\n"]])
def test_no_text_is_an_error(tmp_path, texts):
    with pytest.raises(TokenizerError, match="there is no text to train a tokenizer on; check --input and --json_key"):
        train_sentencepiece(texts, tmp_path / "t.model", vocab_size=300)


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TokenizerError, match=r"cannot write .*file/t\.model: .*choose a writable folder"):
        train_sentencepiece([TEXT], tmp_path / "file" / "t.model", vocab_size=320)
