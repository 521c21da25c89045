"""A SentencePiece tokenizer, its added tokens included, as the tokenizer.json that transformers and vLLM read.

The steps are SentencePiece's own: normalize, put a blank in front, escape blanks, cut. Text between two added tokens
passes through all of them on its own, as it does in `SentencePieceTokenizer`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron.checkpoint.sentencepiece_proto import ModelType, Piece, PieceType, SentencePieceModel
from megatron.errors import TokenizerError
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

_BLANK = "▁"
# Below every score that a trainer gives: text that spells out a byte piece, <0x0A>, must not become that byte.
_NEVER = -1e9
_NUM_PROBES = 400
_PROBES = (
    " ",
    "   leading and trailing   ",
    "tabs\tand\r\nnew lines\n\n\n",
    "a\u00a0b\u3000c \u200bd \ufeff ▁ \0 end",
    "Ünïcödé — “quotes” … ﬁ ligature ① Å",
    "日本語のテキスト、こんにちは世界。",
    "emoji 😀😀 👩‍👩‍👧‍👦 🇫🇷",
    "print('x')  # <0x0A> 0123456789",
    "a" * 301,
)


def tokenizer_json(
    tokenizer: SentencePieceTokenizer, model: SentencePieceModel, extra_tokens: Collection[str]
) -> Tokenizer:
    """The same tokenizer for the `tokenizers` library. Added tokens are special ones, but for `extra_tokens`.

    Raises TokenizerError for a kind of model that the library has no counterpart of.
    """
    if model.type not in (ModelType.BPE, ModelType.UNIGRAM) or model.whitespace_is_suffix:
        what = "blanks as suffixes" if model.whitespace_is_suffix else f"type {model.type.name.lower()}"
        raise TokenizerError(
            f"a SentencePiece model with {what} has no counterpart in tokenizer.json; use a bpe or unigram model."
        )
    result = Tokenizer(_bpe(model) if model.type == ModelType.BPE else _unigram(model))
    result.normalizer = _normalizer(model)
    defined = _texts(model, PieceType.USER_DEFINED)
    if defined and model.type == ModelType.BPE:
        longest_first = sorted(defined, key=len, reverse=True)
        pattern = Regex("|".join(_escaped(text) for text in longest_first))
        result.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    result.decoder = _decoder(model)
    control = [*_texts(model, PieceType.UNKNOWN), *_texts(model, PieceType.CONTROL)]
    names = [*control, *sorted(tokenizer.added_tokens, key=tokenizer.added_tokens.__getitem__)]
    for name in names:
        result.add_tokens([AddedToken(name, normalized=False, special=name not in extra_tokens)])
    return result


def first_difference(ours: SentencePieceTokenizer, theirs: Tokenizer, model: SentencePieceModel) -> str | None:
    """A text that `theirs` cuts otherwise than `ours`, None if there is none among some hundred of all kinds."""
    for text in _probes(model):
        if ours.encode(text) != theirs.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _bpe(model: SentencePieceModel) -> models.BPE:
    """Every way to make a piece of two others is a merge, the piece with the best score first."""
    mergeable = set(_texts(model, PieceType.NORMAL))
    by_score = sorted((-piece.score, i) for i, piece in enumerate(model.pieces) if piece.type == PieceType.NORMAL)
    merges = []
    for _, i in by_score:
        text = model.pieces[i].text
        cuts = ((text[:k], text[k:]) for k in range(1, len(text)))
        merges += [cut for cut in cuts if cut[0] in mergeable and cut[1] in mergeable]
    return models.BPE(
        vocab={piece.text: i for i, piece in enumerate(model.pieces)},
        merges=merges,
        unk_token=_unknown(model)[1].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        # Text that is cut out because it is a piece that the user defined stays that piece.
        ignore_merges=bool(_texts(model, PieceType.USER_DEFINED)),
    )


def _unigram(model: SentencePieceModel) -> models.Unigram:
    """Equal but for ties: SentencePiece adds scores in single precision, the library in double."""
    best = max((piece.score for piece in model.pieces if piece.type == PieceType.NORMAL), default=0.0)

    def score(piece: Piece) -> float:
        if piece.type == PieceType.USER_DEFINED:
            return len(piece.text.encode()) * best - 0.1
        return piece.score if piece.type in (PieceType.NORMAL, PieceType.UNKNOWN) else _NEVER

    vocabulary = [(piece.text, score(piece)) for piece in model.pieces]
    return models.Unigram(vocabulary, _unknown(model)[0], model.byte_fallback)


def _normalizer(model: SentencePieceModel) -> normalizers.Sequence:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex("^ +"), ""),
            normalizers.Replace(Regex(" +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if model.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _BLANK))
    return normalizers.Sequence(steps)


def _decoder(model: SentencePieceModel) -> decoders.Sequence:
    steps: list[decoders.Decoder] = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _unknown(model: SentencePieceModel) -> tuple[int, Piece]:
    return next((i, piece) for i, piece in enumerate(model.pieces) if piece.type == PieceType.UNKNOWN)


def _texts(model: SentencePieceModel, kind: PieceType) -> list[str]:
    return [piece.text for piece in model.pieces if piece.type == kind]


def _escaped(text: str) -> str:
    """For the library's regular expressions, in which every character that is no letter or digit may be escaped."""
    return "".join(c if c.isalnum() or not c.isascii() or c.isspace() else f"\\{c}" for c in text)


def _probes(model: SentencePieceModel) -> Iterator[str]:
    yield from _PROBES
    draw = random.Random(0)
    kinds = (PieceType.NORMAL, PieceType.USER_DEFINED)
    pieces = [piece.text.replace(_BLANK, " ") for piece in model.pieces if piece.type in kinds]
    characters = sorted({c for piece in pieces for c in piece})
    for i in range(_NUM_PROBES):
        # Pieces as they come, few characters in all orders, and characters that no piece was made for.
        some = (pieces, draw.sample(characters, min(3, len(characters))), [*characters, "é", "日", "😀"])[i % 3]
        yield "".join(draw.choice(some) for _ in range(draw.randrange(1, 40)))
