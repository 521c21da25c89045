"""SentencePiece models, with the additions of Megatron-LLM in its order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megatron.errors import TokenizerError
from megatron.tokenizer.protocol import TokenArray, TokenizerIdentity, check_ids, encode_in_threads
from megatron.tokenizer.special_tokens import (
    PAD_ADDITION,
    SENTENCEPIECE_ADDITIONS,
    TokenSplitter,
    assign_ids,
    numbered_tokens,
)


class SentencePieceTokenizer:
    """A tokenizer.model and, after its pieces, the added tokens.

    Order of the additions: `<CLS> <SEP> <EOD> <MASK>`, `<PAD>` if the model has no padding piece,
    `<extra_id_i>`, then `extra_tokens`. With `no_new_tokens` only the last two groups are added and
    documents end and are padded with eos. Text between two added tokens is encoded on its own.
    """

    name = "SentencePieceTokenizer"

    def __init__(
        self,
        model_file: Path,
        *,
        vocab_extra_ids: int = 0,
        extra_tokens: Sequence[str] = (),
        no_new_tokens: bool = False,
        parse_special: bool = False,
    ):
        self.model_proto, self._model = _load(model_file)
        self.num_model_pieces: int = self._model.get_piece_size()
        self.bos = _present(self._model.bos_id())
        self.eos = _present(self._model.eos_id())
        model_pad = _present(self._model.pad_id())

        defaults: list[str] = []
        if not no_new_tokens:
            defaults = [*SENTENCEPIECE_ADDITIONS, *([PAD_ADDITION] if model_pad is None else [])]
        names = [*defaults, *numbered_tokens(vocab_extra_ids), *extra_tokens]
        pieces = {self._model.id_to_piece(i): i for i in range(self.num_model_pieces)}
        added = assign_ids(names, pieces, self.num_model_pieces)
        self.added_tokens: Mapping[str, int] = added
        self.vocab_size = max(self.num_model_pieces, 1 + max(added.values(), default=-1))
        self.eod = self.eos if no_new_tokens else added["<EOD>"]
        self.pad = self.eos if no_new_tokens else added.get(PAD_ADDITION, model_pad)
        self.cls, self.sep, self.mask = added.get("<CLS>"), added.get("<SEP>"), added.get("<MASK>")

        control = {piece: i for piece, i in pieces.items() if self._model.is_control(i)}
        matched = {**control, **added} if parse_special else {token: added[token] for token in extra_tokens}
        self._splitter = TokenSplitter(matched)
        self._literals = {i: token for token, i in {**control, **added}.items()}
        self.literals = frozenset([*added, *(piece for piece, i in pieces.items() if not self._is_ordinary(i))])
        self.identity = TokenizerIdentity(
            type=self.name,
            vocab_size=self.vocab_size,
            file_sha256=hashlib.sha256(self.model_proto).hexdigest(),
            added_tokens=tuple(added),
            bos=self.bos,
            eos=self.eos,
            pad=self.pad,
            eod=self.eod,
            parse_special=parse_special,
        )

    @property
    def library(self) -> sentencepiece.SentencePieceProcessor:
        """The library's own tokenizer, without the added tokens."""
        return self._model

    def token_id(self, token: str) -> int | None:
        if token in self.added_tokens:
            return self.added_tokens[token]
        piece: int = self._model.piece_to_id(token)
        return piece if self._model.id_to_piece(piece) == token else None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._model.encode(part))
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[TokenArray]:
        return encode_in_threads(self._encode_many, texts, num_threads)

    def _encode_many(self, texts: Sequence[str]) -> list[TokenArray]:
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def _is_ordinary(self, piece: int) -> bool:
        """A byte piece is written <0x0A> in the model, and yet no text that says so becomes it."""
        model = self._model
        return not (model.is_control(piece) or model.is_unknown(piece) or model.is_unused(piece)) or model.is_byte(
            piece
        )

    def decode(self, ids: Sequence[int]) -> str:
        check_ids(ids, self.vocab_size, self.name)
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            token = int(token)
            if token in self._literals:
                parts += [self._model.decode(run), self._literals[token]]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._model.decode(run)])


def _load(model_file: Path) -> tuple[bytes, sentencepiece.SentencePieceProcessor]:
    try:
        proto = model_file.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"cannot read {model_file}: {error.strerror}; --tokenizer_model names a SentencePiece tokenizer.model."
        ) from error
    if not proto:  # the library takes no bytes for no model, and answers every text with no ids
        raise TokenizerError(f"{model_file} is empty; copy the tokenizer.model again.")
    try:
        return proto, sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise TokenizerError(
            f"{model_file} is not a SentencePiece model; a tokenizer.json or a Hugging Face folder is loaded with "
            "--tokenizer_type HuggingFaceTokenizer."
        ) from error


def _present(token: int) -> int | None:
    """SentencePiece says -1 for a token that a model does not have."""
    return None if token < 0 else token
