"""A tokenizer's ids computed by gigatoken, many times faster, and compared with the tokenizer's own all along.

The one place that imports gigatoken. It knows byte-level BPE and SentencePiece BPE.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers

from megatron.tokenizer.library import LibraryTokenizer
from megatron.tokenizer.protocol import TokenArray, Tokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

if TYPE_CHECKING:
    import gigatoken

CHECKED_ONE_IN = 1000
# No more of one text, which alone could take the tokenizer itself hours.
CHECKED_CHARACTERS = 1 << 14
# Of a thousand special tokens, which take seconds to look at, one of the first few will do, or none.
BOUNDARIES_TRIED = 8
# gigatoken computes one batch at a time. One that takes long it cuts up, for threads of its own.
MIN_PARALLEL_BYTES = 1 << 20
# Of every text this long a thousandth is compared, somewhere in it.
LONG_CHARACTERS = 1 << 16

# What tokenizers are known to disagree about: blanks, digits, contractions, scripts, marks, controls, bytes.
SAMPLE = (
    "It's we'LL they'D don’t 'quoted' \"double\" isn't I'm.",
    "  two  blanks\ttab \n\n three\r\nlines \n \n   end   ",
    "x = foo_bar[12345] + 0x1F; // 1,234.56 1234567890 3.14e-10 ½ ² ٣٤٥",
    "naïve café Ελληνικά русский язык 漢字かな 한국어 العربية עברית हिन्दी ไทย",
    "e\u0301 n\u0303 \ufb01 \u00a0\u2003\u3000 \u200b\u200d \ufeff \ufffd 👍🏽 👩‍👩‍👧 🇨🇭 𝔘𝔫𝔦",
    "\0\x01\x1f\x7f\x85 a\x0bb\x0cc \u2028\u2029",
    "<html><b>&amp;</b></html> {'a': [1, 2]} #!/bin/sh $HOME ~/x.py a@b.ch https://x.org/?q=%20&r=1",
    "snake_case camelCase SCREAMING kebab-case ... --- ___ !!!???",
    " ",
    "\n",
    "a",
)


class FastTokenizerUnavailable(Exception):
    """Why the fast road is not taken."""


class FastTokenizerMismatch(Exception):
    """The fast ids of a text are not the tokenizer's."""


class GigatokenEncoder:
    """Encodes batches with gigatoken; texts that spell out a special token go to `reference`.

    One text in a thousand is encoded by both. Raises `FastTokenizerUnavailable` when built for a tokenizer that
    gigatoken does not know or does not reproduce on `sample`, `FastTokenizerMismatch` when a later text differs.
    Long texts are computed by `num_threads` threads.
    """

    def __init__(self, reference: Tokenizer, *, num_threads: int, sample: Iterable[str] = ()):
        # Read when gigatoken starts its threads, which it does once.
        os.environ["RAYON_NUM_THREADS"] = str(num_threads)
        self._reference = reference
        self._fast = _load(reference)
        self._boundary = _find_boundary(reference, self._fast)
        self._literals = _LiteralFinder(reference.literals)
        parts = [part for text in (*SAMPLE, *sample) for part in self._literals.split(text[:CHECKED_CHARACTERS])]
        ordinary = [part for part in parts if not self._literals.found_in(part)]
        try:
            for text, ids in zip(ordinary, self._encode(ordinary), strict=True):
                self._compare(text, ids)
        except FastTokenizerMismatch as error:
            raise FastTokenizerUnavailable(str(error)) from error

    def encode_batch(self, texts: Sequence[str], seed: int) -> list[TokenArray]:
        """The ids of every text. Which of them are compared is a function of `seed` and their number alone."""
        slow = [self._literals.found_in(text) for text in texts]
        fast_ids = iter(self._encode([text for text, is_slow in zip(texts, slow, strict=True) if not is_slow]))
        slow_ids = iter(
            self._reference.encode_batch([text for text, is_slow in zip(texts, slow, strict=True) if is_slow])
        )
        result = [next(slow_ids) if is_slow else next(fast_ids) for is_slow in slow]
        for index in range(-seed % CHECKED_ONE_IN, len(texts), CHECKED_ONE_IN):
            if len(texts[index]) > CHECKED_CHARACTERS:
                self._compare_part(texts[index][:CHECKED_CHARACTERS])
            elif not slow[index]:
                self._compare(texts[index], result[index])
        for index, text in enumerate(texts):
            if len(text) >= LONG_CHARACTERS:
                self._compare_part(_window(text, seed + index))
        return result

    def _encode(self, texts: list[str]) -> list[TokenArray]:
        if not texts:
            return []
        try:
            if self._boundary is None:
                return [self._fast.encode(text).view(np.int32) for text in texts]
            row = self._encode_row(self._boundary.token.join(texts).encode())
        except BaseException as error:  # a panic of Rust code is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise FastTokenizerMismatch(f"gigatoken failed ({error})") from error
        return _cut(row, self._boundary.id, len(texts))

    def _encode_row(self, text: bytes) -> TokenArray:
        """As `encode`, but without the interpreter. One row needs no padding."""
        from gigatoken import BytesSource  # for a list of texts the library imports awkward, a third of a second long

        is_long = len(text) >= MIN_PARALLEL_BYTES
        rows, _ = self._fast.encode_batch_padded(BytesSource([text]), pad_id=0, parallel=is_long)
        return rows[0].view(np.int32)

    def _compare_part(self, part: str) -> None:
        if not self._literals.found_in(part):
            self._compare(part, self._encode([part])[0])

    def _compare(self, text: str, ids: TokenArray) -> None:
        if not np.array_equal(ids, self._reference.encode_batch([text])[0]):
            raise FastTokenizerMismatch(f"gigatoken's ids differ from the {self._reference.name}'s in {text[:60]!r}...")


class _Boundary(NamedTuple):
    """A token that stands between texts which are encoded as one, and in none of them."""

    token: str
    id: int


def _find_boundary(reference: Tokenizer, fast: gigatoken.Tokenizer) -> _Boundary | None:
    """A special token whose name is found wherever it is put between two texts, and nowhere else.

    SentencePiece has none, since it is slower in batches than text by text.
    """
    from gigatoken.gigatoken_rs import BPETokenizer

    if not isinstance(reference, LibraryTokenizer) or not isinstance(fast.backend, BPETokenizer):
        return None
    added = sorted(reference.library.get_added_tokens_decoder().items())
    special = [
        _Boundary(token.content, number)
        for number, token in added
        if token.special and token.content and not (token.lstrip or token.rstrip or token.single_word)
    ]
    for boundary in special[:BOUNDARIES_TRIED]:
        if not any(_may_hide(boundary.token, other) for other in reference.literals):
            return boundary
    return None


def _may_hide(token: str, other: str) -> bool:
    """Whether `other`, begun in the text before, may take some of the token: in "a-" + "---" the first "---" does."""
    return (token in other and token != other) or any(other.endswith(token[:end]) for end in range(1, len(token)))


def _cut(ids: TokenArray, boundary: int, num_texts: int) -> list[TokenArray]:
    ends = [*np.flatnonzero(ids == boundary).tolist(), len(ids)]
    if len(ends) != num_texts:
        raise FastTokenizerMismatch(f"gigatoken gave {num_texts} texts back as {len(ends)}")
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [ids[start:end] for start, end in zip(starts, ends, strict=True)]


def _load(reference: Tokenizer) -> gigatoken.Tokenizer:
    try:
        import gigatoken
    except ImportError as error:
        raise FastTokenizerUnavailable("gigatoken is not installed; `pip install gigatoken`") from error
    try:
        if isinstance(reference, SentencePieceTokenizer):
            return gigatoken.Tokenizer.from_sentencepiece(reference.model_proto)
        if isinstance(reference, LibraryTokenizer):
            _refuse_what_no_comparison_shows(reference.library)
            return gigatoken.Tokenizer.from_json(reference.library.to_str())
    except FastTokenizerUnavailable:
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FastTokenizerUnavailable(f"gigatoken cannot load this {reference.name} ({error})") from error
    raise FastTokenizerUnavailable(f"gigatoken has no {reference.name}")


def _refuse_what_no_comparison_shows(library: tokenizers.Tokenizer) -> None:
    if getattr(library.model, "dropout", None):
        raise FastTokenizerUnavailable("the tokenizer drops merges at random")
    added = library.get_added_tokens_decoder()
    if library.normalizer is not None and any(token.normalized for token in added.values()):
        raise FastTokenizerUnavailable("the tokenizer finds added tokens in normalized text")
    if _changes_text(library) and any(_may_come_up(library, number, token.content) for number, token in added.items()):
        raise FastTokenizerUnavailable("normalized text may hold added tokens unseen")


def _changes_text(library: tokenizers.Tokenizer) -> bool:
    """By a normalizer, or a blank put in front."""
    splits = [] if library.pre_tokenizer is None else library.pre_tokenizer.pre_tokenize_str("a")
    return library.normalizer is not None or [piece for piece, _ in splits] != ["a"]


def _may_come_up(library: tokenizers.Tokenizer, number: int, token: str) -> bool:
    """Whether the bytes of an added token are a piece under another id, or can be composed from others."""
    bytes_as_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = "".join(piece for piece, _ in bytes_as_letters.pre_tokenize_str(token))
    return library.token_to_id(letters) not in (None, number) or not unicodedata.is_normalized("NFD", token)


def _window(text: str, seed: int) -> str:
    """A thousandth of a long text, somewhere in it."""
    length = min(len(text) // CHECKED_ONE_IN, CHECKED_CHARACTERS)
    start = zlib.crc32(seed.to_bytes(8, "little")) % (len(text) - length)
    return text[start : start + length]


class _LiteralFinder:
    """Whether a text names one of many tokens. Most do not even hold what the tokens start with, which is seen fast."""

    def __init__(self, literals: Iterable[str]):
        tokens = sorted({token for token in literals if token})
        groups = itertools.groupby(tokens, key=lambda token: token[:2])
        self._starts = tuple(_common_start(list(group)) for _, group in groups)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def split(self, text: str) -> list[str]:
        """What is between the tokens."""
        return [part for part in self._pattern.split(text) if part]

    def found_in(self, text: str) -> bool:
        return any(start in text for start in self._starts) and self._pattern.search(text) is not None


def _common_start(words: Sequence[str]) -> str:
    first, last = min(words), max(words)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]
