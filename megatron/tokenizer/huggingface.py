"""Hugging Face's tokenizer.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megatron.errors import TokenizerError
from megatron.tokenizer.library import LibraryTokenizer

TOKENIZER_FILE = "tokenizer.json"
# First those that name the token, then those that give its id: the order in which transformers trusts them.
TOKEN_NAME_FILES = ("tokenizer_config.json", "special_tokens_map.json")
TOKEN_ID_FILES = ("generation_config.json", "config.json")


class HuggingFaceTokenizer(LibraryTokenizer):
    """A folder with a tokenizer.json, or that file; bos, eos and the others come from the files beside it.

    `extra_tokens` are matched in text, also those that the file holds as special.
    """

    name = "HuggingFaceTokenizer"

    def __init__(
        self, path: Path, *, vocab_extra_ids: int = 0, extra_tokens: Sequence[str] = (), parse_special: bool = False
    ):
        file = path / TOKENIZER_FILE if path.is_dir() else path
        self._folder = file.parent
        super().__init__(
            *_load(file, extra_tokens),
            vocab_extra_ids=vocab_extra_ids,
            extra_tokens=extra_tokens,
            parse_special=parse_special,
        )

    def special_id(self, role: str) -> int | None:
        for file_name in TOKEN_NAME_FILES:
            token = _read_json(self._folder / file_name).get(f"{role}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                return self._id_of(token, role, self._folder / file_name)
        for file_name in TOKEN_ID_FILES:
            token_id = _read_json(self._folder / file_name).get(f"{role}_token_id")
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


class FalconTokenizer(HuggingFaceTokenizer):
    """Falcon's tokenizer.json, wherever it lies: it ends documents with ``<|endoftext|>`` also without files beside."""

    name = "FalconTokenizer"

    def special_id(self, role: str) -> int | None:
        named = super().special_id(role)
        return self._model.token_to_id("<|endoftext|>") if named is None and role == "eos" else named


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
