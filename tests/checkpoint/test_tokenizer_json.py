"""A SentencePiece model as tokenizer.json cuts every text as SentencePiece does."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import sentencepiece

from megatron.checkpoint.sentencepiece_proto import read_sentencepiece
from megatron.checkpoint.tokenizer_json import first_difference, tokenizer_json
from megatron.errors import TokenizerError
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from tiny_tokenizers import TEXT

OTHER_TEXT = [
    "日本語のテキスト、こんにちは世界。 Ünïcödé — “quotes” … ﬁ ①",
    "emoji 😀😀👩‍👩‍👧‍👦 🇫🇷   def f(x):    return  x == 0x0A",
]
# Llama's choices; what a variant says differs.
LLAMA = {
    "vocab_size": 400,
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "minloglevel": 2,
}
# name -> options, and how many of 2,000 hard texts may differ: ties of a unigram model, whose scores are added in
# another precision, and Unicode's combining characters under nfkc, which the library normalizes by grapheme.
VARIANTS: dict[str, tuple[dict[str, object], int]] = {
    "llama": ({}, 0),
    "no bytes": ({"byte_fallback": False}, 0),
    "no prefix": ({"add_dummy_prefix": False}, 0),
    "gemma": ({"add_dummy_prefix": False, "user_defined_symbols": ["▁▁", "▁▁▁", "\n\n", "[x]", "^a-z]"]}, 0),
    "user-defined and prefix": ({"user_defined_symbols": ["\n\n", "[x]", "<0x41>z"]}, 0),
    "nfkc": ({"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}, 0),
    "unigram": ({"model_type": "unigram"}, 20),
    "unigram, user-defined": ({"model_type": "unigram", "user_defined_symbols": ["\n\n", "[x]"]}, 20),
}


def train(folder: Path, **options: object) -> Path:
    model = io.BytesIO()
    lines = [line for line in [*TEXT.splitlines(), *OTHER_TEXT * 4] if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**LLAMA, **options})
    file = folder / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


def hard_texts(pieces: list[str]) -> list[str]:
    draw = random.Random(1)
    alphabet = [*"aeio thn   \n\t.,;[x]é日😀\u200d▁\0"]
    texts = ["", " ", "\n", " a", "a ", "▁a", "\ufeff", "\u3000x", "ab" * 400, " " * 77, *OTHER_TEXT]
    while len(texts) < 2000:
        few = [draw.choice(alphabet) for _ in range(2)]
        some = (pieces, alphabet, few)[len(texts) % 3]
        texts.append("".join(draw.choice(some) for _ in range(draw.randrange(1, 40))))
    return texts


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_of_all_kinds_get_the_ids_that_sentencepiece_gives(name: str, tmp_path: Path) -> None:
    options, num_ties = VARIANTS[name]
    file = train(tmp_path, **options)
    model = read_sentencepiece(file.read_bytes())
    ours = SentencePieceTokenizer(file)
    theirs = tokenizer_json(ours, model, ())
    pieces = [piece.text.replace("▁", " ") for piece in model.pieces if not piece.text.startswith("<")]
    differ = [t for t in hard_texts(pieces) if ours.encode(t) != theirs.encode(t, add_special_tokens=False).ids]
    assert len(differ) <= num_ties, differ[0]
    assert num_ties or first_difference(ours, theirs, model) is None


def test_text_beside_added_tokens_is_cut_as_we_cut_it(tmp_path: Path) -> None:
    file = train(tmp_path)
    extra = ["[formula]", "[formula]+", "the"]
    ours = SentencePieceTokenizer(file, vocab_extra_ids=2, extra_tokens=extra, parse_special=True)
    theirs = tokenizer_json(ours, read_sentencepiece(file.read_bytes()), extra)
    draw = random.Random(0)
    parts = [*ours.added_tokens, "<s>", "</s>", " ", "  a", "b ", "of the man", "\n", "日", "[formula"]
    for _ in range(500):
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(1, 12)))
        assert theirs.encode(text).ids == ours.encode(text), text


def test_added_tokens_have_our_ids_and_only_the_asked_for_ones_are_no_special_tokens(tmp_path: Path) -> None:
    file = train(tmp_path)
    ours = SentencePieceTokenizer(file, vocab_extra_ids=2, extra_tokens=["[x]", "</s>"])
    theirs = tokenizer_json(ours, read_sentencepiece(file.read_bytes()), ["[x]", "</s>"])
    added = {token.content: (i, token.special) for i, token in theirs.get_added_tokens_decoder().items()}
    assert {name: added[name][0] for name in ours.added_tokens} == dict(ours.added_tokens)
    assert {name for name, (_, special) in added.items() if not special} == {"[x]", "</s>"}
    assert theirs.get_vocab_size() == ours.vocab_size


def test_text_comes_back(tmp_path: Path) -> None:
    file = train(tmp_path)
    ours = SentencePieceTokenizer(file)
    theirs = tokenizer_json(ours, read_sentencepiece(file.read_bytes()), ())
    for text in [*TEXT.splitlines(), *OTHER_TEXT, " leading", "日 ☃ \n"]:
        assert theirs.decode(ours.encode(text)) == text == ours.decode(ours.encode(text))


def test_a_difference_is_found(tmp_path: Path) -> None:
    file = train(tmp_path)
    ours = SentencePieceTokenizer(file)
    model = read_sentencepiece(file.read_bytes())
    theirs = tokenizer_json(ours, model, ())
    theirs.normalizer = None
    assert first_difference(ours, theirs, model) is not None


@pytest.mark.parametrize(
    ("options", "what"),
    [({"model_type": "char"}, "type char"), ({"treat_whitespace_as_suffix": True}, "blanks as suffixes")],
)
def test_other_kinds_of_models_are_refused(options: dict[str, object], what: str, tmp_path: Path) -> None:
    file = train(tmp_path, **options)
    with pytest.raises(TokenizerError) as error:
        tokenizer_json(SentencePieceTokenizer(file), read_sentencepiece(file.read_bytes()), ())
    assert str(error.value) == (
        f"a SentencePiece model with {what} has no counterpart in tokenizer.json; use a bpe or unigram model."
    )
