"""From a `TokenizerConfig` to a tokenizer, alone or fitted to the rows of a checkpoint's embedding."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from megatron.errors import ConfigError, TokenizerError
from megatron.tokenizer.config import TokenizerConfig
from megatron.tokenizer.huggingface import TOKENIZER_FILE, HuggingFaceTokenizer
from megatron.tokenizer.null import NullTokenizer
from megatron.tokenizer.protocol import Tokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron.tokenizer.special_tokens import numbered_tokens

SENTENCEPIECE_FILE = "tokenizer.model"
TYPES = (SentencePieceTokenizer.name, HuggingFaceTokenizer.name, NullTokenizer.name)
TYPES_OF_OTHER_PROGRAMS = ("GPT2BPETokenizer", "FalconTokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")

logger = logging.getLogger(__name__)


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Loads the tokenizer that `config` names. Without a type, the kind of file decides.

    Raises `ConfigError` for flags that do not name a tokenizer, `TokenizerError` for files that are not one.
    """
    tokenizer_type = config.tokenizer_type or _type_of_file(config)
    if tokenizer_type in TYPES_OF_OTHER_PROGRAMS:
        raise ConfigError(
            f"--tokenizer_type {tokenizer_type} is not available; use --tokenizer_type HuggingFaceTokenizer with "
            "--tokenizer_model naming the model's folder or its tokenizer.json, which gives the same ids."
        )
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
    path = Path(config.path)
    if tokenizer_type == HuggingFaceTokenizer.name:
        return _build_huggingface(path, config)
    return _build_sentencepiece(path / SENTENCEPIECE_FILE if path.is_dir() else path, config)


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
    if config.path is None:
        if config.vocab_size is not None:
            return NullTokenizer.name
        raise ConfigError(
            "no tokenizer is given; name a SentencePiece tokenizer.model, a Hugging Face folder or a tokenizer.json "
            "with --tokenizer_model, or give --tokenizer_type NullTokenizer --vocab_size N."
        )
    is_huggingface = config.path.endswith(".json") or Path(config.path).is_dir()
    return HuggingFaceTokenizer.name if is_huggingface else SentencePieceTokenizer.name


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
        logger.warning("%s has no %s; %s is used instead.", path, TOKENIZER_FILE, sentencepiece_file)
        return _build_sentencepiece(sentencepiece_file, config)
    return HuggingFaceTokenizer(
        path,
        vocab_extra_ids=config.vocab_extra_ids,
        extra_tokens=config.vocab_extra_ids_list,
        parse_special=config.parse_special,
    )


def _build_sentencepiece(model_file: Path, config: TokenizerConfig) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(
        model_file,
        vocab_extra_ids=config.vocab_extra_ids,
        extra_tokens=config.vocab_extra_ids_list,
        no_new_tokens=config.no_new_tokens,
        parse_special=config.parse_special,
    )
