"""Files of ranks: base64 of a token's bytes and its rank on every line, as tiktoken and Llama 3 have them.

Such a file holds neither the pattern that cuts text into words nor the special tokens; both belong to the encoding.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from megatron.errors import ConfigError, TokenizerError
from megatron.tokenizer.library import LibraryTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NOT_LOWER, _NOT_UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_NOT_LOWER}]*[{_NOT_UPPER}]+{_CONTRACTIONS}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_NOT_LOWER}]+[{_NOT_UPPER}]*{_CONTRACTIONS}?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _llama3_special() -> tuple[str, ...]:
    """256 tokens behind the ranks: a few have names, the others are numbered."""
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    numbers = iter(range(256))
    names = [named[i] if i in named else f"reserved_special_token_{next(numbers)}" for i in range(256)]
    return tuple(f"<|{name}|>" for name in names)


@dataclass(frozen=True)
class Encoding:
    """What the file of ranks leaves open: the pattern of words, and special tokens by their distance to the ranks."""

    num_ranks: int
    pattern: str
    special: Mapping[int, str]
    bos: str | None = None
    eos: str = "<|endoftext|>"
    pad: str | None = None


ENCODINGS: Mapping[str, Encoding] = {
    "llama3": Encoding(
        128_000,
        _CL100K,
        dict(enumerate(_llama3_special())),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|finetune_right_pad_id|>",
    ),
    "cl100k": Encoding(
        100_256,
        _CL100K,
        {1: "<|endoftext|>", 2: "<|fim_prefix|>", 3: "<|fim_middle|>", 4: "<|fim_suffix|>", 20: "<|endofprompt|>"},
    ),
    "o200k": Encoding(199_998, _O200K, {1: "<|endoftext|>", 20: "<|endofprompt|>"}),
    "gpt2": Encoding(50_256, _GPT2, {0: "<|endoftext|>"}),
}


class TikTokenizer(LibraryTokenizer):
    """A file of ranks. Without `encoding`, the number of ranks tells which of the published ones it is."""

    name = "TikTokenizer"

    def __init__(
        self,
        ranks_file: Path,
        *,
        encoding: str | None = None,
        vocab_extra_ids: int = 0,
        extra_tokens: Sequence[str] = (),
        parse_special: bool = False,
    ):
        content, ranks = _read(ranks_file)
        name = encoding if encoding is not None else _encoding_of(ranks_file, ranks)
        self._encoding = ENCODINGS[name]
        model = _build(ranks, self._encoding, extra_tokens)
        super().__init__(
            model,
            hashlib.sha256(content + name.encode()).hexdigest(),
            vocab_extra_ids=vocab_extra_ids,
            extra_tokens=extra_tokens,
            parse_special=parse_special,
        )

    def special_id(self, role: str) -> int | None:
        token = {"bos": self._encoding.bos, "eos": self._encoding.eos, "pad": self._encoding.pad}.get(role)
        return None if token is None else self._model.token_to_id(token)


def is_ranks_file(file: Path) -> bool:
    """Whether the file starts like one; a SentencePiece model, which has the same name, does not."""
    try:
        with file.open("rb") as content:
            first = content.read(512).split(b"\n")[0]
        _parse(first)
    except (OSError, ValueError):
        return False
    return True


def _parse(line: bytes) -> tuple[bytes, int]:
    token, rank = line.split()
    return base64.b64decode(token, validate=True), int(rank)


def _read(file: Path) -> tuple[bytes, dict[bytes, int]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"cannot read {file}: {error.strerror}; --tokenizer_model names a file of ranks."
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = _parse(line)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"{file}:{number}: {line[:40]!r} is not the base64 of a token and its rank; copy the file again."
            ) from error
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        what = f"byte {missing[0]} has no rank" if missing else f"the ranks do not count from 0 to {len(ranks) - 1}"
        raise TokenizerError(f"{file}: {what}; the file is damaged: copy it again.")
    return content, ranks


def _encoding_of(file: Path, ranks: Mapping[bytes, int]) -> str:
    for name, encoding in ENCODINGS.items():
        if len(ranks) == encoding.num_ranks:
            return name
    raise ConfigError(
        f"{file} has {len(ranks)} ranks and is none of the encodings that are known by their number; say how it cuts "
        f"text into words with --tiktoken_encoding {', '.join(ENCODINGS)}."
    )


def _build(ranks: Mapping[bytes, int], encoding: Encoding, extra_tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Any two neighbours whose union has a rank may be merged, the lowest rank first: so every split of every token
    is a merge, in the order of ranks."""
    letters = _byte_letters()
    vocabulary = {"".join(map(letters.__getitem__, token)): rank for token, rank in ranks.items()}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    special = {token: len(ranks) + distance for distance, token in encoding.special.items()}
    # In the vocabulary too, since the library would number them on without a gap; no word is spelled like one.
    model = tokenizers.Tokenizer(tokenizers.models.BPE({**vocabulary, **special}, merges, ignore_merges=True))
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(encoding.pattern), "isolated")
    to_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, to_letters])
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([token for token in special if token not in extra_tokens])
    return model


def _byte_letters() -> list[str]:
    """The letter under which the library knows each byte: itself where it is visible, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]
