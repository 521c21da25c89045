"""For data that is tokenized already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron.errors import TokenizerError
from megatron.tokenizer.protocol import TokenArray, TokenizerIdentity, check_ids


class NullTokenizer:
    """Exactly `vocab_size` ids, none of them special: a text is its ids in decimal, separated by spaces.

    It has no end-of-document id, since it cannot know which of the ids the data uses for it.
    """

    name = "NullTokenizer"
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    eod: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.added_tokens: Mapping[str, int] = {}
        self.literals: frozenset[str] = frozenset()
        self.identity = TokenizerIdentity(type=self.name, vocab_size=vocab_size)

    def token_id(self, token: str) -> int | None:
        return None

    def encode(self, text: str) -> list[int]:
        return [self._parse(word) for word in text.split()]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[TokenArray]:
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size, self.name)
        return " ".join(str(int(token)) for token in ids)

    def _parse(self, word: str) -> int:
        if not (word.isascii() and word.isdigit()):
            raise TokenizerError(
                f"{word!r} is not an id; with NullTokenizer a text holds decimal ids separated by spaces."
            )
        if int(word) >= self.vocab_size:
            raise TokenizerError(
                f"id {word} is outside --vocab_size {self.vocab_size}; ids go from 0 to {self.vocab_size - 1}."
            )
        return int(word)
