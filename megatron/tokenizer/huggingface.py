"""Hugging Face's tokenizer.json through the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron.errors import TokenizerError
from megatron.tokenizer.protocol import TokenArray, TokenizerIdentity, check_ids, encode_in_threads
from megatron.tokenizer.special_tokens import numbered_tokens

TOKENIZER_FILE = "tokenizer.json"
# First those that name the token, then those that give its id: the order in which transformers trusts them.
TOKEN_NAME_FILES = ("tokenizer_config.json", "special_tokens_map.json")
TOKEN_ID_FILES = ("generation_config.json", "config.json")


class HuggingFaceTokenizer:
    """A folder with a tokenizer.json, or that file; bos, eos and pad come from the files beside it.

    A document ends with eos. Truncation and padding that the file asks for are switched off, and no
    template adds tokens. `extra_tokens` are matched in text, also those that the file holds as special.
    """

    name = "HuggingFaceTokenizer"

    def __init__(
        self, path: Path, *, vocab_extra_ids: int = 0, extra_tokens: Sequence[str] = (), parse_special: bool = False
    ):
        file = path / TOKENIZER_FILE if path.is_dir() else path
        self._model, sha256 = _load(file, extra_tokens)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.add_special_tokens(numbered_tokens(vocab_extra_ids))
        self._model.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in extra_tokens])
        self._model.encode_special_tokens = not parse_special
        added = [*numbered_tokens(vocab_extra_ids), *extra_tokens]
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.added_tokens: Mapping[str, int] = {token: vocabulary[token] for token in added}
        self.literals = frozenset(
            [*added, *(token.content for token in self._model.get_added_tokens_decoder().values())]
        )
        # Ids may have holes; the largest decides the size of an embedding.
        self.vocab_size = 1 + max(vocabulary.values())
        self.bos = self._special_id("bos", file.parent)
        self.eos = self._special_id("eos", file.parent)
        self.pad = self._special_id("pad", file.parent)
        self.eod = self.eos
        self.identity = TokenizerIdentity(
            type=self.name,
            vocab_size=self.vocab_size,
            file_sha256=sha256,
            added_tokens=tuple(added),
            bos=self.bos,
            eos=self.eos,
            pad=self.pad,
            eod=self.eod,
            parse_special=parse_special,
        )

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

    def _special_id(self, role: str, folder: Path) -> int | None:
        for file_name in TOKEN_NAME_FILES:
            token = _read_json(folder / file_name).get(f"{role}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                return self._id_of(token, role, folder / file_name)
        for file_name in TOKEN_ID_FILES:
            token_id = _read_json(folder / file_name).get(f"{role}_token_id")
            if isinstance(token_id, list):  # several ids end a generation; the first ends a document
                token_id = token_id[0] if token_id else None
            if token_id is not None:
                return token_id
        return None

    def _id_of(self, token: str, role: str, file: Path) -> int:
        token_id = self._model.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{role}_token {token!r} of {file} is not in {TOKENIZER_FILE}; "
                "the two belong to different tokenizers, copy both from one model."
            )
        return token_id


def _load(file: Path, extra_tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer and the hash of its file. Special tokens that `extra_tokens` names become ordinary added ones:
    the library leaves special ones unmatched, whatever is added later."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"cannot read {file}: {error.strerror}; --tokenizer_model names a tokenizer.json or the folder it is in."
        ) from error
    try:
        text = content.decode("utf-8")
        if extra_tokens:
            description = json.loads(text)
            for added in description.get("added_tokens", []):
                added["special"] = added["special"] and added["content"] not in extra_tokens
            text = json.dumps(description, ensure_ascii=False)
        return tokenizers.Tokenizer.from_str(text), hashlib.sha256(content).hexdigest()
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            f"{file} is not a tokenizer.json ({error}); a SentencePiece tokenizer.model is loaded with "
            "--tokenizer_type SentencePieceTokenizer."
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON ({error}); copy it again from the model.") from error
