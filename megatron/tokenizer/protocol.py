"""What the rest of the program knows about a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron.errors import TokenizerError

TokenArray = np.ndarray
"""Ids of one text: int32, one dimension."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """Everything that decides which ids a text becomes; equal identities give equal ids.

    Checkpoints record it, and caches of tokenized text are keyed by its `fingerprint`.
    """

    type: str
    vocab_size: int
    file_sha256: str | None = None
    added_tokens: tuple[str, ...] = ()
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    eod: int | None = None
    parse_special: bool = False

    @property
    def fingerprint(self) -> str:
        """A hexadecimal digest of all fields, the same on every machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Tokenizer(Protocol):
    """Text to ids and back.

    Special-token strings that a text spells out, such as `</s>`, stay text; tokens of
    `--vocab_extra_ids_list` become their ids. No encoding adds bos or eos.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> TokenizerIdentity: ...

    @property
    def vocab_size(self) -> int:
        """Every id is below it; added tokens are counted."""

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Tokens that are not in the tokenizer's own file, or that text may name, with their ids."""

    @property
    def literals(self) -> frozenset[str]:
        """Every token that has an id by its name: where a text spells one out, it is not ordinary text."""

    def token_id(self, token: str) -> int | None:
        """The id of the token of this name, None where there is none."""

    @property
    def bos(self) -> int | None: ...

    @property
    def eos(self) -> int | None: ...

    @property
    def pad(self) -> int | None: ...

    @property
    def eod(self) -> int | None:
        """The id that ends a document in pre-training data."""

    @property
    def cls(self) -> int | None: ...

    @property
    def sep(self) -> int | None: ...

    @property
    def mask(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[TokenArray]:
        """The ids of every text as int32. The interpreter is free meanwhile, so that callers may use threads too."""

    def decode(self, ids: Sequence[int]) -> str: ...


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise TokenizerError(
                f"id {token} is outside the {vocab_size} ids of the {name}; decode with the tokenizer that wrote it."
            )


def encode_in_threads(
    encode_many: Callable[[Sequence[str]], list[TokenArray]], texts: Sequence[str], num_threads: int
) -> list[TokenArray]:
    """`encode_many(texts)` computed by `num_threads` threads, in order; `encode_many` frees the interpreter."""
    if num_threads == 1 or len(texts) < 2:
        return encode_many(texts)
    # Several slices per thread, so that one with long texts does not leave the other threads idle.
    size = max(1, len(texts) // (4 * num_threads))
    slices = [texts[start : start + size] for start in range(0, len(texts), size)]
    with ThreadPoolExecutor(num_threads) as pool:
        return [ids for part in pool.map(encode_many, slices) for ids in part]
