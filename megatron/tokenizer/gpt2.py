"""GPT-2's byte-level BPE from its two original files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from megatron.errors import TokenizerError
from megatron.tokenizer.library import LibraryTokenizer

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
END_OF_TEXT = "<|endoftext|>"


class GPT2BPETokenizer(LibraryTokenizer):
    """A vocab.json and a merges.txt. ``<|endoftext|>`` ends documents, and is bos and eos."""

    name = "GPT2BPETokenizer"

    def __init__(
        self,
        vocab_file: Path,
        merge_file: Path,
        *,
        vocab_extra_ids: int = 0,
        extra_tokens: Sequence[str] = (),
        parse_special: bool = False,
    ):
        model, sha256 = _load(vocab_file, merge_file)
        if END_OF_TEXT not in extra_tokens:
            model.add_special_tokens([END_OF_TEXT])
        super().__init__(
            model,
            sha256,
            vocab_extra_ids=vocab_extra_ids,
            extra_tokens=extra_tokens,
            parse_special=parse_special,
        )

    def special_id(self, role: str) -> int | None:
        return self._model.token_to_id(END_OF_TEXT) if role in ("bos", "eos") else None


def _load(vocab_file: Path, merge_file: Path) -> tuple[tokenizers.Tokenizer, str]:
    content = b"".join(_read(file) for file in (vocab_file, merge_file))
    try:
        model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab_file), str(merge_file)))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            f"{vocab_file} and {merge_file} are no vocabulary and merges of one byte-level BPE ({error}); copy both "
            "from one model."
        ) from error
    if model.token_to_id(END_OF_TEXT) is None:
        raise TokenizerError(f"{vocab_file} has no {END_OF_TEXT}, which ends documents; copy the file from its model.")
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model, hashlib.sha256(content).hexdigest()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"cannot read {file}: {error.strerror}; GPT2BPETokenizer needs --vocab_file vocab.json and --merge_file "
            "merges.txt, or their folder as --tokenizer_model."
        ) from error
