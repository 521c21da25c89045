"""BERT's WordPiece from its vocab.txt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from megatron.errors import TokenizerError
from megatron.tokenizer.library import LibraryTokenizer
from megatron.tokenizer.protocol import Tokenizer

VOCAB_FILE = "vocab.txt"
UNKNOWN = "[UNK]"
ROLES: Mapping[str, str] = {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "pad": "[PAD]"}


class BertWordPieceCase(LibraryTokenizer):
    """A vocab.txt, one piece a line. No token ends a document."""

    name = "BertWordPieceCase"
    lowercase = False

    def __init__(
        self,
        vocab_file: Path,
        *,
        vocab_extra_ids: int = 0,
        extra_tokens: Sequence[str] = (),
        parse_special: bool = False,
    ):
        model, sha256 = _load(vocab_file, self.lowercase)
        model.add_special_tokens([token for token in (UNKNOWN, *ROLES.values()) if token not in extra_tokens])
        super().__init__(
            model,
            sha256,
            vocab_extra_ids=vocab_extra_ids,
            extra_tokens=extra_tokens,
            parse_special=parse_special,
        )

    def special_id(self, role: str) -> int | None:
        return self._model.token_to_id(ROLES[role]) if role in ROLES else None


class BertWordPieceLowerCase(BertWordPieceCase):
    """The same for a vocabulary of small letters without accents: text is made so first."""

    name = "BertWordPieceLowerCase"
    lowercase = True


def word_continuations(tokenizer: Tokenizer) -> np.ndarray | None:
    """bool [vocab_size], true for pieces inside of a word ("##ing"); None where the tokenizer knows no words."""
    if not isinstance(tokenizer, LibraryTokenizer):
        return None
    model = tokenizer.library.model
    if not isinstance(model, tokenizers.models.WordPiece):
        return None
    continues = np.zeros(tokenizer.vocab_size, dtype=bool)
    for piece, number in tokenizer.library.get_vocab(with_added_tokens=False).items():
        continues[number] = piece.startswith(model.continuing_subword_prefix)
    return continues


def _load(vocab_file: Path, lowercase: bool) -> tuple[tokenizers.Tokenizer, str]:
    try:
        content = vocab_file.read_bytes()
        pieces = content.decode("utf-8").splitlines()
    except OSError as error:
        raise TokenizerError(
            f"cannot read {vocab_file}: {error.strerror}; --vocab_file names BERT's vocab.txt."
        ) from error
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{vocab_file} is not a vocab.txt, it is no UTF-8 text; copy it from its model."
        ) from error
    vocabulary = {piece.strip(): i for i, piece in enumerate(pieces)}
    missing = [token for token in (UNKNOWN, *ROLES.values()) if token not in vocabulary]
    if missing:
        raise TokenizerError(
            f"{vocab_file} has no piece {missing[0]} and so is not BERT's vocab.txt, one piece a line; copy the file "
            "from its model."
        )
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token=UNKNOWN))
    model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.decoder = tokenizers.decoders.WordPiece()
    return model, hashlib.sha256(content).hexdigest()
