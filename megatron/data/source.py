"""From what a user gives as ``--data_path`` to an open dataset whose ids fit the model."""

import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.data.file_lock import exclusive
from megatron.data.index_cache import remove_leftovers
from megatron.data.indexed import IndexedDataset, default_cache_path
from megatron.data.object_store import ObjectStore, is_remote
from megatron.durable import sync_folder
from megatron.errors import DataError

logger = logging.getLogger(__name__)

# Text files that are tokenized when they are first used.
TEXT_SUFFIXES = (".jsonl", ".txt")

TokenizeFile = Callable[[Path, Path], None]
"""Tokenize a text file into ``<output prefix>.bin/.idx``: called with the file and the prefix."""

_SAMPLED_BLOCKS = 256
_SAMPLED_BLOCK_BYTES = 4096

# Up to this many tokens all are compared with the vocabulary, a second or so; beyond, blocks spread over the file.
_MAX_TOKENS_CHECKED = 1 << 28
_MAX_TOKENS_CHECKED_FAR = 1 << 22
_CHECK_BLOCK_TOKENS = 1 << 18


def open_data(
    path: str | os.PathLike[str],
    *,
    tokenize_file: TokenizeFile | None = None,
    tokenizer_fingerprint: str = "",
    cache_path: Path | None = None,
    store: ObjectStore | None = None,
) -> IndexedDataset:
    """Open a dataset by its prefix (with or without .bin or .idx), or a .jsonl or .txt file through the tokenizer.

    Text is tokenized once into `cache_path` (by default the folder ``cache`` beside it), keyed by the file and by
    `tokenizer_fingerprint`; other processes wait meanwhile.
    """
    file = Path(path)
    if file.suffix not in TEXT_SUFFIXES:
        return IndexedDataset(path, store)
    if is_remote(path):
        raise DataError(
            f"{path}: is text in an object store, and only tokenized data is read from there; tokenize a local copy "
            "with tools/preprocess_data.py and give the prefix of what it wrote."
        )
    if not file.is_file():
        raise DataError(f"{file}: there is no such text file; check --data_path.")
    if tokenize_file is None:
        raise DataError(
            f"{file}: is text, and there is no tokenizer to read it with; give a tokenizer (--tokenizer_type, "
            f"--tokenizer_model), or the prefix of a tokenized dataset."
        )
    folder = cache_path if cache_path is not None else default_cache_path(file)
    prefix = folder / f"{file.stem}-{_text_key(file, tokenizer_fingerprint)}"
    return _open_intact(prefix) or _tokenize_once(file, prefix, tokenize_file)


def _tokenize_once(file: Path, prefix: Path, tokenize_file: TokenizeFile) -> IndexedDataset:
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(prefix):
            finished = _open_intact(prefix)  # another process may have made it while this one waited
            if finished is not None:
                return finished
            logger.info("tokenizing %s once into %s.bin and .idx", file, prefix)
            remove_leftovers(prefix)
            return _tokenize_aside(file, prefix, tokenize_file)
    except OSError as error:
        raise DataError(
            f"{prefix.parent}: the tokenized {file.name} cannot be cached here ({error.strerror}); give a writable "
            f"folder with space as --data_cache_path."
        ) from error


def _tokenize_aside(file: Path, prefix: Path, tokenize_file: TokenizeFile) -> IndexedDataset:
    """Under a name of its own: where locks hold within a node only, other nodes do the same at once."""
    aside = prefix.with_name(f"{prefix.name}.{uuid.uuid4().hex}.tmp")
    try:
        tokenize_file(file, aside)
        finished = _open_intact(prefix)
        if finished is not None:
            return finished
        # Whoever does this beside us moves the same bytes, so any mixture of the two pairs is right.
        for suffix in (".bin", ".idx"):
            os.replace(f"{aside}{suffix}", f"{prefix}{suffix}")
        sync_folder(prefix.parent)
        return IndexedDataset(prefix)
    finally:
        for suffix in (".bin", ".idx"):
            Path(f"{aside}{suffix}").unlink(missing_ok=True)


def _open_intact(prefix: Path) -> IndexedDataset | None:
    if not Path(f"{prefix}.idx").exists():
        return None
    try:
        return IndexedDataset(prefix)
    except DataError as error:
        logger.warning("the cached dataset is damaged and is made again: %s", error)
        return None


def _text_key(file: Path, tokenizer_fingerprint: str) -> str:
    """Identify text and tokenizer: size, time of change and blocks sampled over the file, first and last included."""
    facts = file.stat()
    digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns} {tokenizer_fingerprint} ".encode())
    with open(file, "rb") as content:
        last_start = max(facts.st_size - _SAMPLED_BLOCK_BYTES, 0)
        for start in np.unique(np.linspace(0, last_start, _SAMPLED_BLOCKS).astype(np.int64)):
            content.seek(int(start))
            digest.update(content.read(_SAMPLED_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def check_vocabulary(indexed: IndexedDataset, vocab_size: int) -> None:
    """Raise `DataError` when the data holds an id outside 0 to `vocab_size` - 1.

    Looks at every token, or in a dataset of more than 2**28 tokens (2**22 where it is in an object store) at that many
    in evenly spaced blocks.
    """
    if indexed.dtype.kind not in "iu":
        raise DataError(
            f"{indexed.prefix}: holds {indexed.dtype.name} values, which are not token ids; choose the dataset that "
            f"tools/preprocess_data.py wrote."
        )
    for start in _block_starts(indexed):
        block = indexed.tokens[start : start + _CHECK_BLOCK_TOKENS]
        low, high = int(block.min()), int(block.max())
        if low >= 0 and high < vocab_size:
            continue
        wrong = high if high >= vocab_size else low
        position = start + int(np.argmax(block == wrong))
        raise DataError(
            f"{indexed.prefix}.bin: token id {wrong} at position {position} is outside the vocabulary of {vocab_size} "
            f"(0 to {vocab_size - 1}); the data was made with another tokenizer: give that one, or preprocess the text "
            f"again with this one."
        )


def _block_starts(indexed: IndexedDataset) -> list[int]:
    most = _MAX_TOKENS_CHECKED_FAR if indexed.is_remote else _MAX_TOKENS_CHECKED
    if indexed.num_tokens <= most:
        return list(range(0, indexed.num_tokens, _CHECK_BLOCK_TOKENS))
    num_blocks = most // _CHECK_BLOCK_TOKENS
    starts: list[int] = np.linspace(0, indexed.num_tokens - _CHECK_BLOCK_TOKENS, num_blocks).astype(np.int64).tolist()
    return starts
