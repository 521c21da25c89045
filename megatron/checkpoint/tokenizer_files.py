"""The files of a tokenizer, as they travel beside weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from megatron.checkpoint.source import TokenizerIdentity
from megatron.errors import CheckpointError
from megatron.tokenizer.gpt2 import MERGES_FILE, VOCAB_FILE
from megatron.tokenizer.protocol import Tokenizer, file_sha256
from megatron.tokenizer.tiktoken import TikTokenizer, is_ranks_file

TOKENIZER_FOLDER: Final = "tokenizer"

SENTENCEPIECE_FILE: Final = "tokenizer.model"
HUGGING_FACE_FILE: Final = "tokenizer.json"
CONFIG_FILE: Final = "tokenizer_config.json"
# What older tokenizers consist of; transformers makes a tokenizer.json of them when it loads them.
_VOCABULARIES: Final = (VOCAB_FILE, "vocab.txt")
_MAIN_FILES: Final = frozenset((SENTENCEPIECE_FILE, HUGGING_FACE_FILE, *_VOCABULARIES))
_OTHER_FILES: Final = (
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    *_VOCABULARIES,
    MERGES_FILE,
    "chat_template.jinja",
    "chat_template.json",
)


def holds_tokenizer(path: Path) -> bool:
    """Whether `path` is a tokenizer's file, or a folder with one."""
    return path.is_file() or bool(_known_files(path).keys() & _MAIN_FILES)


def tokenizer_files(path: Path, merge_file: Path | None = None) -> dict[str, Path]:
    """File names, as transformers knows them, -> the files of the tokenizer at `path`: a folder, or its main file.

    With `merge_file`, `path` is a vocabulary of GPT-2's kind, whatever both are called, and what lies beside it is
    another tokenizer. Raises CheckpointError if there is no tokenizer.
    """
    if merge_file is not None:
        vocabulary = path / VOCAB_FILE if path.is_dir() else path
        return {VOCAB_FILE: vocabulary, MERGES_FILE: merge_file}
    if path.is_file():
        main = path.name if path.name in _MAIN_FILES else _main_name(path)
        return {**_known_files(path.parent), main: path}
    files = _known_files(path)
    if not files.keys() & _MAIN_FILES:
        raise CheckpointError(
            f"{path} holds no tokenizer; give a folder with {HUGGING_FACE_FILE} or {SENTENCEPIECE_FILE}, or the file."
        )
    return files


def identity_of(folder: Path) -> TokenizerIdentity | None:
    """The tokenizer in `folder`, None if there is none. tokenizer.json counts first, as it does in transformers."""
    if (file := folder / HUGGING_FACE_FILE).exists():
        return TokenizerIdentity("HuggingFaceTokenizer", str(folder.absolute()), file_sha256(file))
    if (file := folder / SENTENCEPIECE_FILE).exists():
        kind = "TikTokenizer" if is_ranks_file(file) else "SentencePieceTokenizer"
        return TokenizerIdentity(kind, str(file.absolute()), file_sha256(file))
    return None


def is_recorded(recorded: TokenizerIdentity, tokenizer: Tokenizer, path: Path) -> bool:
    """Whether `tokenizer`, loaded from `path`, has the hash that was recorded."""
    if recorded.sha256 == tokenizer.identity.file_sha256:
        return True
    # TikTokenizer hashes its encoding too, which nobody knew who recorded a file of ranks without loading it.
    file = path / SENTENCEPIECE_FILE if path.is_dir() else path
    return tokenizer.name == TikTokenizer.name and recorded.sha256 == file_sha256(file)


def first_identity(folders: Iterable[Path]) -> TokenizerIdentity | None:
    """The tokenizer in the first of `folders` that has one: by its kind and place, as nobody recorded its hash."""
    found = next((found for folder in folders if (found := identity_of(folder)) is not None), None)
    return None if found is None else replace(found, sha256=None)


def _known_files(folder: Path) -> dict[str, Path]:
    names = (SENTENCEPIECE_FILE, HUGGING_FACE_FILE, *_OTHER_FILES)
    return {name: folder / name for name in names if (folder / name).is_file()}


def _main_name(file: Path) -> str:
    return {".json": HUGGING_FACE_FILE, ".txt": "vocab.txt"}.get(file.suffix, SENTENCEPIECE_FILE)
