"""Training a SentencePiece model, with Llama's choices: text goes in and comes back unchanged, byte for byte."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from megatron.errors import TokenizerError

# 256 bytes, unknown, bos and eos; every character that is common in the text comes on top.
NUM_BASIC_PIECES = 259
# The trainer takes one line at a time and drops what is longer than its limit, so lines are cut before it.
MAX_LINE_CHARACTERS = 1 << 16
SAMPLE_CHARACTERS = 80


@dataclass(frozen=True)
class TrainingReport:
    """What a trained tokenizer does with the text it was trained on."""

    vocab_size: int
    num_documents: int
    text_bytes: int
    bytes_per_token: float
    sample: str
    sample_pieces: tuple[str, ...]


def train_sentencepiece(
    texts: Iterable[str],
    model_file: Path,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    max_text_bytes: int = 1_000_000_000,
    num_threads: int = 1,
) -> TrainingReport:
    """Trains on the first `max_text_bytes` of the texts and writes `model_file`, whole or not at all.

    No normalization; unknown characters become bytes, digits stand alone, blanks are kept. The ids 0, 1
    and 2 are unknown, bos and eos; there is no padding piece.
    """
    if vocab_size <= NUM_BASIC_PIECES:
        raise TokenizerError(_too_small(vocab_size, NUM_BASIC_PIECES + 1))
    used = _take(texts, max_text_bytes)
    if not any(text.strip() for text in used):
        raise TokenizerError("there is no text to train a tokenizer on; check --input and --json_key.")
    proto = _train(used, vocab_size, model_type, num_threads)
    _write(proto, model_file)
    return _report(sentencepiece.SentencePieceProcessor(model_proto=proto), used)


def _take(texts: Iterable[str], max_bytes: int) -> list[str]:
    used: list[str] = []
    num_bytes = 0
    for text in texts:
        if used and num_bytes >= max_bytes:
            break
        used.append(text)
        num_bytes += len(text.encode())
    return used


def _train(texts: list[str], vocab_size: int, model_type: str, num_threads: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=num_threads,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            max_sentence_length=4 * MAX_LINE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _lines(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                yield line[start : start + MAX_LINE_CHARACTERS]


def _explain(message: str, vocab_size: int) -> str:
    if too_high := re.search(r"too high.*<= (\d+)", message):
        return f"--vocab_size {vocab_size} is more pieces than this text has; give at most {too_high[1]}, or more text."
    if too_low := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return _too_small(vocab_size, int(too_low[1]))
    return f"SentencePiece could not train with --vocab_size {vocab_size} ({message}); try a smaller one or more text."


def _too_small(vocab_size: int, smallest: int) -> str:
    return (
        f"--vocab_size {vocab_size} has no room for the {NUM_BASIC_PIECES} basic pieces and the text's characters; "
        f"give at least {smallest}."
    )


def _write(proto: bytes, model_file: Path) -> None:
    temporary = model_file.with_name(f"{model_file.name}.{os.getpid()}.tmp")
    try:
        model_file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(proto)
        os.replace(temporary, model_file)
    except OSError as error:
        raise TokenizerError(
            f"cannot write {model_file}: {error.strerror}; choose a writable folder with space as --output."
        ) from error


def _report(model: sentencepiece.SentencePieceProcessor, texts: list[str]) -> TrainingReport:
    text_bytes = sum(len(text.encode()) for text in texts)
    num_tokens = sum(len(model.encode(text)) for text in texts)
    sample = _first_sentence(texts)
    return TrainingReport(
        vocab_size=model.get_piece_size(),
        num_documents=len(texts),
        text_bytes=text_bytes,
        bytes_per_token=text_bytes / num_tokens,
        sample=sample,
        sample_pieces=tuple(model.encode(sample, out_type=str)),
    )


def _first_sentence(texts: list[str]) -> str:
    """The first line that is long enough to show something, without its end; in short texts the longest line."""
    longest = ""
    for line in (line for text in texts for line in text.splitlines()):
        longest = max(longest, line, key=len)
        if len(longest) >= SAMPLE_CHARACTERS // 2:
            break
    return longest if len(longest) <= SAMPLE_CHARACTERS else longest[:SAMPLE_CHARACTERS].rsplit(" ", 1)[0]
