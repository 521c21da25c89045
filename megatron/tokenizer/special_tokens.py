"""Tokens beside the ones a tokenizer's file knows: their ids, and where a text names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

SENTENCEPIECE_ADDITIONS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
PAD_ADDITION = "<PAD>"


def numbered_tokens(count: int) -> list[str]:
    return [f"<extra_id_{i}>" for i in range(count)]


def assign_ids(tokens: Iterable[str], known: Mapping[str, int], first_new_id: int) -> dict[str, int]:
    """Ids in order from `first_new_id`; a token that is known keeps the id it has."""
    ids: dict[str, int] = {}
    for token in tokens:
        if token in known:
            ids[token] = known[token]
        elif token not in ids:
            ids[token] = first_new_id
            first_new_id += 1
    return ids


class TokenSplitter:
    """Cuts a text at the tokens it names, the longest one where several match."""

    def __init__(self, ids: Mapping[str, int]):
        self._ids = dict(ids)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if ids else None

    def split(self, text: str) -> list[str | int]:
        """The text between tokens as strings, the tokens as ids, in order; no empty strings."""
        if self._pattern is None:
            return [text] if text else []
        # A pattern with one group makes every odd piece a token.
        pieces = self._pattern.split(text)
        return [self._ids[piece] if i % 2 else piece for i, piece in enumerate(pieces) if piece]
