"""Every tokenizer that the `tokenizers` library computes, whatever files it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers

from megatron.tokenizer.protocol import TokenArray, TokenizerIdentity, check_ids, encode_in_threads
from megatron.tokenizer.special_tokens import numbered_tokens


class LibraryTokenizer:
    """`model` with the tokens that flags add. A document ends with eos.

    Truncation and padding that the model asks for are switched off, and no template adds tokens. `extra_tokens` are
    matched in text; the model must not hold them as special ones, which the library leaves unmatched.
    """

    name = "LibraryTokenizer"

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        file_sha256: str,
        *,
        vocab_extra_ids: int = 0,
        extra_tokens: Sequence[str] = (),
        parse_special: bool = False,
    ):
        self._model = model
        model.no_truncation()
        model.no_padding()
        model.add_special_tokens(numbered_tokens(vocab_extra_ids))
        model.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in extra_tokens])
        model.encode_special_tokens = not parse_special
        added = [*numbered_tokens(vocab_extra_ids), *extra_tokens]
        vocabulary = model.get_vocab(with_added_tokens=True)
        self.added_tokens: Mapping[str, int] = {token: vocabulary[token] for token in added}
        self.literals = frozenset([*added, *(token.content for token in model.get_added_tokens_decoder().values())])
        # Ids may have holes; the largest decides the size of an embedding.
        self.vocab_size = 1 + max(vocabulary.values())
        self.bos = self.special_id("bos")
        self.eos = self.special_id("eos")
        self.pad = self.special_id("pad")
        self.cls = self.special_id("cls")
        self.sep = self.special_id("sep")
        self.mask = self.special_id("mask")
        self.eod = self.eos
        self.identity = TokenizerIdentity(
            type=self.name,
            vocab_size=self.vocab_size,
            file_sha256=file_sha256,
            added_tokens=tuple(added),
            bos=self.bos,
            eos=self.eos,
            pad=self.pad,
            eod=self.eod,
            parse_special=parse_special,
        )

    def token_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def special_id(self, role: str) -> int | None:
        """The id of the token for "bos", "eos", "pad", "cls", "sep" or "mask", None where there is none."""
        raise NotImplementedError

    @property
    def library(self) -> tokenizers.Tokenizer:
        """The library's own tokenizer, added tokens included."""
        return self._model

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[TokenArray]:
        # The library would otherwise use every core, however few are asked for; it reads this before each batch.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return encode_in_threads(self._encode_many, texts, num_threads)

    def _encode_many(self, texts: Sequence[str]) -> list[TokenArray]:
        # A batch frees the interpreter where a single text does not, and the fast variant computes no offsets.
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size, self.name)
        return self._model.decode([int(token) for token in ids], skip_special_tokens=False)
