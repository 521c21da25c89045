"""The tokenizer that a tree was trained with, as its arguments record it and as they are to record it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megatron.checkpoint.hf_files import read_json
from megatron.checkpoint.source import JSON, Source
from megatron.checkpoint.tokenizer_files import CONFIG_FILE, SENTENCEPIECE_FILE
from megatron.checkpoint.tokenizer_source import files_beside
from megatron.tokenizer.wordpiece import VOCAB_FILE, BertWordPieceCase, BertWordPieceLowerCase

_SENTENCEPIECE: Final = "SentencePieceTokenizer"
# Megatron-LM's names for a SentencePiece model that nothing is added to.
_PLAIN_SENTENCEPIECE: Final = ("GPTSentencePieceTokenizer", "Llama2Tokenizer")
_TYPES: Mapping[object, str] = {
    **dict.fromkeys((_SENTENCEPIECE, *_PLAIN_SENTENCEPIECE), _SENTENCEPIECE),
    "GPT2BPETokenizer": "GPT2BPETokenizer",
    "FalconTokenizer": "FalconTokenizer",
    "HuggingFaceTokenizer": "HuggingFaceTokenizer",
    "TikTokenizer": "TikTokenizer",
    BertWordPieceLowerCase.name: BertWordPieceLowerCase.name,
    BertWordPieceCase.name: BertWordPieceCase.name,
}


def recorded_tokenizer(args: object, beside: Path) -> dict[str, JSON]:
    """The fields of the tokenizer's configuration that `args` know; none where no tokenizer was trained with.

    `beside` is where converters leave a SentencePiece model. A file that is gone is named all the same: with the right
    one given, the rest still counts.
    """
    known = vars(args)
    recorded_type = known.get("tokenizer_type")
    tokenizer_type = _TYPES.get(recorded_type) if isinstance(recorded_type, str) else None
    file = _text(known, "tokenizer_model") or _text(known, "vocab_file")
    if tokenizer_type is None or (file is None and "new_tokens" not in known):
        return {}
    if tokenizer_type == _SENTENCEPIECE and beside.is_file():
        file = str(beside)
    extra_ids, listed = known.get("vocab_extra_ids"), _text(known, "vocab_extra_ids_list")
    return {
        "tokenizer_type": tokenizer_type,
        "tokenizer_model": file,
        "merge_file": _text(known, "merge_file") if tokenizer_type == "GPT2BPETokenizer" else None,
        "vocab_extra_ids": extra_ids if isinstance(extra_ids, int) else 0,
        "vocab_extra_ids_list": listed.split(",") if listed else [],
        "no_new_tokens": recorded_type in _PLAIN_SENTENCEPIECE or known.get("new_tokens") is False,
    }


def tokenizer_arguments(source: Source) -> dict[str, Any]:
    """What a tree of `source` records of a SentencePiece tokenizer; the additions only where a run has trained."""
    file = sentencepiece_file(source)
    state = source.state()
    section = None if state is None else state.config.get("tokenizer")
    if file is None or not isinstance(section, Mapping):
        return {"vocab_file": None if file is None else str(file.absolute())}
    listed = section.get("vocab_extra_ids_list") or ()
    assert isinstance(listed, list | tuple)
    return {
        "vocab_file": str(file.absolute()),
        "vocab_extra_ids": section.get("vocab_extra_ids") or 0,
        "vocab_extra_ids_list": ",".join(map(str, listed)) or None,
        "new_tokens": not section.get("no_new_tokens"),
    }


def wordpiece_arguments(source: Source) -> dict[str, Any]:
    """The same of a BERT's tokenizer: with small letters only, unless the source says otherwise."""
    identity, files = source.tokenizer(), files_beside(source)
    has_capitals = identity is not None and identity.tokenizer_type == BertWordPieceCase.name
    if CONFIG_FILE in files:
        has_capitals = has_capitals or read_json(files[CONFIG_FILE]).get("do_lower_case") is False
    file = files.get(VOCAB_FILE)
    return {
        "tokenizer_type": (BertWordPieceCase if has_capitals else BertWordPieceLowerCase).name,
        "vocab_file": None if file is None else str(file.absolute()),
    }


def sentencepiece_file(source: Source) -> Path | None:
    """The SentencePiece model that lies with `source`, if that is its tokenizer."""
    identity = source.tokenizer()
    if identity is None or identity.tokenizer_type != _SENTENCEPIECE:
        return None
    return files_beside(source).get(SENTENCEPIECE_FILE)


def _text(known: Mapping[str, Any], name: str) -> str | None:
    value = known.get(name)
    return value if isinstance(value, str) and value else None
