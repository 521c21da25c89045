"""Which tokenizer a checkpoint belongs to: what its run was configured with, wherever its folder is by now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.checkpoint.source import Source
from megatron.checkpoint.tokenizer_files import (
    SENTENCEPIECE_FILE,
    TOKENIZER_FOLDER,
    holds_tokenizer,
    is_recorded,
    tokenizer_files,
)
from megatron.errors import CheckpointError
from megatron.tokenizer.config import TokenizerConfig
from megatron.tokenizer.huggingface import HuggingFaceTokenizer
from megatron.tokenizer.protocol import Tokenizer

logger = logging.getLogger(__name__)

# The fields that decide which ids there are beside those of the files.
ADDITIONS: Final = ("vocab_extra_ids", "vocab_extra_ids_list", "no_new_tokens")
_KEPT: Final = (*ADDITIONS, "tokenizer_type", "tiktoken_encoding")


def tokenizer_of(
    source: Source, *, path: str | None = None, additions: Mapping[str, Any] | None = None
) -> TokenizerConfig | None:
    """The tokenizer of `source`, None if it is nowhere. `path` and `additions` count before what is recorded.

    Raises CheckpointError if there is no tokenizer at `path`.
    """
    recorded = _recorded(source)
    found = _place(source, recorded) if path is None else Path(path)
    if found is None:
        return None
    merge_file = _merge_file(recorded, found)
    files = tokenizer_files(found, merge_file)
    if not recorded and not additions:
        # Weights that were only converted: their tokenizer is what its files say, and transformers knows how to read
        # all of them but a tokenizer.model alone.
        if files.keys() - {SENTENCEPIECE_FILE}:
            folder = found if found.is_dir() else found.parent
            return TokenizerConfig(tokenizer_type=HuggingFaceTokenizer.name, tokenizer_model=str(folder))
        return TokenizerConfig(tokenizer_model=str(found), no_new_tokens=True)
    kept = {name: recorded[name] for name in _KEPT if recorded.get(name) is not None}
    if (identity := source.tokenizer()) is not None and recorded:
        kept.setdefault("tokenizer_type", identity.tokenizer_type)
    if path is not None:
        kept = {**kept, "tokenizer_type": None, "tiktoken_encoding": None}
    if merge_file is not None:
        kept["merge_file"] = str(merge_file)
    return TokenizerConfig(**{**kept, "tokenizer_model": str(found), **(additions or {})})


def check_tokenizer(source: Source, tokenizer: Tokenizer, path: str | None, *, is_named: bool) -> None:
    """Compares `tokenizer`, loaded from `path`, with the one whose ids the rows of `source` stand for.

    Another one in the place of the recorded is a CheckpointError; one that the user named (`is_named`), unless it is
    the copy beside the checkpoint, is taken with a warning. The hash comes from loading the tokenizer: no file is read
    for it again.
    """
    recorded, sha256 = source.tokenizer(), tokenizer.identity.file_sha256
    if recorded is None or recorded.sha256 is None or sha256 is None or path is None:
        return
    if is_recorded(recorded, tokenizer, Path(path)):
        return
    beside = (source.path.parent / TOKENIZER_FOLDER).resolve()
    is_copy = beside in (Path(path).resolve(), *Path(path).resolve().parents)
    what = f"{path} is not the tokenizer of {source.path}: its SHA-256 is {sha256}, the recorded one {recorded.sha256}"
    if is_copy or not is_named:
        raise CheckpointError(f"{what}. Restore its files, or name the right tokenizer with --tokenizer_model.")
    # Weights that were only converted came with files of several kinds, of which one was recorded.
    if recorded.tokenizer_type == tokenizer.name or _recorded(source):
        logger.warning("%s. It is used as named; the same ids must stand for the same tokens.", what)


def files_beside(source: Source) -> dict[str, Path]:
    """The files of the tokenizer that lies with `source`, by the names they travel under; none if there is none."""
    identity = source.tokenizer()
    named = [] if identity is None or not identity.tokenizer_model else [Path(identity.tokenizer_model)]
    # A run's copy counts before the place that the manifest names: the folder may have been moved.
    own = [source.path.parent / TOKENIZER_FOLDER] if (source.path / MANIFEST_FILE).is_file() else []
    folder = [source.path] if source.path.is_dir() else []
    place = next((place for place in (*own, *named, *folder) if holds_tokenizer(place)), None)
    return {} if place is None else tokenizer_files(place)


def _recorded(source: Source) -> Mapping[str, Any]:
    """The fields of the run's `TokenizerConfig`; none for weights that no run has saved."""
    state = source.state()
    section = None if state is None else state.config.get("tokenizer")
    if not isinstance(section, Mapping):
        return {}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


def _merge_file(recorded: Mapping[str, Any], found: Path) -> Path | None:
    """That of the vocabulary `found`, if the run named one and it is still there."""
    named = recorded.get("merge_file")
    is_its_own = str(found) in (recorded.get("tokenizer_model"), recorded.get("vocab_file"))
    return Path(named) if named and is_its_own and Path(named).is_file() else None


def _place(source: Source, recorded: Mapping[str, Any]) -> Path | None:
    """What the checkpoint names, or its copy beside the checkpoint."""
    identity = source.tokenizer()
    named = recorded.get("tokenizer_model") or recorded.get("vocab_file") or (identity and identity.tokenizer_model)
    merges = recorded.get("merge_file")
    if named and Path(named).exists() and (not merges or Path(merges).exists()):
        return Path(named)
    for folder in (source.path / TOKENIZER_FOLDER, source.path.parent / TOKENIZER_FOLDER):
        if named and named.endswith(".model") and (folder / SENTENCEPIECE_FILE).is_file():
            return folder / SENTENCEPIECE_FILE
        if folder.is_dir():
            return folder
    return None
