"""From a `TokenizerConfig` to a tokenizer, alone or fitted to the rows of a checkpoint's embedding."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from megatron.errors import ConfigError, TokenizerError
from megatron.tokenizer import gpt2, wordpiece
from megatron.tokenizer.config import TokenizerConfig
from megatron.tokenizer.gpt2 import GPT2BPETokenizer
from megatron.tokenizer.huggingface import TOKENIZER_FILE, FalconTokenizer, HuggingFaceTokenizer
from megatron.tokenizer.null import NullTokenizer
from megatron.tokenizer.protocol import Tokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron.tokenizer.special_tokens import numbered_tokens
from megatron.tokenizer.tiktoken import TikTokenizer, is_ranks_file
from megatron.tokenizer.wordpiece import BertWordPieceCase, BertWordPieceLowerCase

SENTENCEPIECE_FILE = "tokenizer.model"

logger = logging.getLogger(__name__)

Builder = Callable[[Path, TokenizerConfig], Tokenizer]
"""Loads a tokenizer from its file, or from the folder it is in."""


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Loads the tokenizer that `config` names. Without a type, the kind of file decides.

    Raises `ConfigError` for flags that do not name a tokenizer, `TokenizerError` for files that are not one.
    """
    tokenizer_type = config.tokenizer_type or _type_of_file(config)
    if tokenizer_type not in TYPES:
        raise ConfigError(f"--tokenizer_type {tokenizer_type} is unknown; use one of {', '.join(TYPES)}.")
    if tokenizer_type == NullTokenizer.name:
        return _build_null(config)
    if config.path is None:
        raise ConfigError(f"--tokenizer_type {tokenizer_type} needs its file; give --tokenizer_model PATH.")
    if config.vocab_size is not None:
        raise ConfigError(
            f"--vocab_size {config.vocab_size} is for NullTokenizer; {tokenizer_type} has its file's size: drop it."
        )
    if config.tiktoken_encoding is not None and tokenizer_type != TikTokenizer.name:
        raise ConfigError(
            f"--tiktoken_encoding {config.tiktoken_encoding} is for TikTokenizer, and this is a {tokenizer_type}; drop "
            "one of them."
        )
    return BUILDERS[tokenizer_type](Path(config.path), config)


def fit_to_vocabulary(config: TokenizerConfig, num_rows: int) -> Tokenizer:
    """The tokenizer for a model whose embedding has `num_rows` rows, padding not counted.

    SentencePiece's default additions are left out, with a message, where the rows are exactly those of
    tokenizer.model. Any other id without a row is a `TokenizerError`.
    """
    tokenizer = build_tokenizer(config)
    if tokenizer.vocab_size <= num_rows:
        return tokenizer
    asked_for = _asked_for(config)
    num_model_pieces = tokenizer.num_model_pieces if isinstance(tokenizer, SentencePieceTokenizer) else None
    if num_rows == num_model_pieces and not config.no_new_tokens and not asked_for:
        logger.warning(
            "%s is used without <CLS>, <SEP>, <EOD>, <MASK> and <PAD>: the checkpoint has embedding rows for its "
            "%d pieces only. Documents end with eos; data must have been tokenized with --no_new_tokens too.",
            config.path,
            num_rows,
        )
        return build_tokenizer(replace(config, no_new_tokens=True))
    raise TokenizerError(_no_row_message(config, tokenizer, asked_for, num_rows))


def _asked_for(config: TokenizerConfig) -> list[str]:
    return [*numbered_tokens(config.vocab_extra_ids), *config.vocab_extra_ids_list]


def _no_row_message(config: TokenizerConfig, tokenizer: Tokenizer, asked_for: list[str], num_rows: int) -> str:
    without_row = [token for token in asked_for if tokenizer.added_tokens[token] >= num_rows]
    if without_row:
        flag = "--vocab_extra_ids_list" if config.vocab_extra_ids_list else "--vocab_extra_ids"
        what = f"{flag}: token {without_row[0]!r} has id {tokenizer.added_tokens[without_row[0]]}"
    else:
        what = f"{tokenizer.name} has ids up to {tokenizer.vocab_size - 1}"
    remedy = f"add rows with tools/checkpoint_util.py --true_vocab_size {tokenizer.vocab_size}"
    if isinstance(tokenizer, SentencePieceTokenizer) and not config.no_new_tokens:
        remedy += f" ({tokenizer.num_model_pieces + len(without_row)} with --no_new_tokens)" if without_row else ""
    return (
        f"{what}, but the checkpoint has {num_rows} embedding rows; {remedy}, or give the checkpoint's own tokenizer."
    )


def _type_of_file(config: TokenizerConfig) -> str:
    if config.merge_file is not None:
        return GPT2BPETokenizer.name
    if config.path is None:
        if config.vocab_size is not None:
            return NullTokenizer.name
        raise ConfigError(
            "no tokenizer is given; name a SentencePiece tokenizer.model, a Hugging Face folder or a tokenizer.json "
            "with --tokenizer_model, or give --tokenizer_type NullTokenizer --vocab_size N."
        )
    path = Path(config.path)
    if path.is_dir():
        return _type_of_folder(path)
    if path.suffix == ".txt":
        raise ConfigError(
            f"{path} may be BERT's vocab.txt, which does not say whether it has capitals; give --tokenizer_type "
            "BertWordPieceLowerCase or BertWordPieceCase."
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer.name
    return TikTokenizer.name if is_ranks_file(path) else SentencePieceTokenizer.name


def _type_of_folder(folder: Path) -> str:
    has_json = (folder / TOKENIZER_FILE).is_file()
    if not has_json and is_ranks_file(folder / SENTENCEPIECE_FILE):
        return TikTokenizer.name
    if not has_json and all((folder / name).is_file() for name in (gpt2.VOCAB_FILE, gpt2.MERGES_FILE)):
        return GPT2BPETokenizer.name
    return HuggingFaceTokenizer.name


def _build_null(config: TokenizerConfig) -> NullTokenizer:
    if config.vocab_size is None or config.vocab_size < 1:
        raise ConfigError(
            f"--tokenizer_type NullTokenizer needs the number of ids in the data, not {config.vocab_size}; "
            "give --vocab_size N."
        )
    if config.path is not None or _asked_for(config):
        raise ConfigError(
            f"NullTokenizer has exactly --vocab_size {config.vocab_size} ids and no tokens of its own; "
            "drop --tokenizer_model, --vocab_file, --vocab_extra_ids and --vocab_extra_ids_list."
        )
    return NullTokenizer(config.vocab_size)


def _build_huggingface(path: Path, config: TokenizerConfig) -> Tokenizer:
    sentencepiece_file = path / SENTENCEPIECE_FILE
    if path.is_dir() and not (path / TOKENIZER_FILE).is_file() and sentencepiece_file.is_file():
        build = _build_tiktoken if is_ranks_file(sentencepiece_file) else _build_sentencepiece
        logger.warning("%s has no %s; %s is used instead.", path, TOKENIZER_FILE, sentencepiece_file)
        return build(sentencepiece_file, config)
    return HuggingFaceTokenizer(path, **_additions(config))


def _build_falcon(path: Path, config: TokenizerConfig) -> Tokenizer:
    return FalconTokenizer(path, **_additions(config))


def _build_sentencepiece(path: Path, config: TokenizerConfig) -> Tokenizer:
    model_file = path / SENTENCEPIECE_FILE if path.is_dir() else path
    return SentencePieceTokenizer(model_file, no_new_tokens=config.no_new_tokens, **_additions(config))


def _build_gpt2(path: Path, config: TokenizerConfig) -> Tokenizer:
    vocab_file = path / gpt2.VOCAB_FILE if path.is_dir() else path
    merge_file = vocab_file.with_name(gpt2.MERGES_FILE) if config.merge_file is None else Path(config.merge_file)
    return GPT2BPETokenizer(vocab_file, merge_file, **_additions(config))


def _build_tiktoken(path: Path, config: TokenizerConfig) -> Tokenizer:
    ranks_file = path / SENTENCEPIECE_FILE if path.is_dir() else path
    return TikTokenizer(ranks_file, encoding=config.tiktoken_encoding, **_additions(config))


def _build_bert_case(path: Path, config: TokenizerConfig) -> Tokenizer:
    return BertWordPieceCase(path / wordpiece.VOCAB_FILE if path.is_dir() else path, **_additions(config))


def _build_bert_lowercase(path: Path, config: TokenizerConfig) -> Tokenizer:
    return BertWordPieceLowerCase(path / wordpiece.VOCAB_FILE if path.is_dir() else path, **_additions(config))


class _Additions(TypedDict):
    vocab_extra_ids: int
    extra_tokens: Sequence[str]
    parse_special: bool


def _additions(config: TokenizerConfig) -> _Additions:
    return {
        "vocab_extra_ids": config.vocab_extra_ids,
        "extra_tokens": config.vocab_extra_ids_list,
        "parse_special": config.parse_special,
    }


BUILDERS: Mapping[str, Builder] = {
    SentencePieceTokenizer.name: _build_sentencepiece,
    HuggingFaceTokenizer.name: _build_huggingface,
    GPT2BPETokenizer.name: _build_gpt2,
    FalconTokenizer.name: _build_falcon,
    TikTokenizer.name: _build_tiktoken,
    BertWordPieceLowerCase.name: _build_bert_lowercase,
    BertWordPieceCase.name: _build_bert_case,
}
TYPES = (*BUILDERS, NullTokenizer.name)
