"""The tokenizer that lies with weights in a foreign format."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from megatron.checkpoint.source import TokenizerIdentity
from megatron.checkpoint.tokenizer_files import HUGGING_FACE_FILE, SENTENCEPIECE_FILE

logger = logging.getLogger(__name__)

# Llama 3's tokenizer.model is a text file: a token in base 64 and its rank on each line.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")


def tokenizer_beside(folders: Iterable[Path]) -> TokenizerIdentity | None:
    """The tokenizer in the first of `folders` that has one.

    Llama 3's tokenizer.model is none of SentencePiece's, and no tokenizer here reads it: None, with a warning.
    """
    for folder in folders:
        if (folder / HUGGING_FACE_FILE).is_file():
            return TokenizerIdentity("HuggingFaceTokenizer", str(folder))
        if (file := folder / SENTENCEPIECE_FILE).is_file():
            with file.open("rb") as opened:
                if not _TIKTOKEN_LINE.fullmatch(opened.readline(1024)):
                    return TokenizerIdentity("SentencePieceTokenizer", str(file))
            logger.warning(
                "%s is a tiktoken file, not SentencePiece: no tokenizer goes with these weights. Give the "
                "Hugging Face tokenizer of the model where one is needed.",
                file,
            )
            return None
    return None
