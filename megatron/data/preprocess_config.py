"""How `tools/preprocess_data.py` turns text into documents: its flags, beside the tokenizer's."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from megatron.errors import ConfigError


@dataclass(frozen=True)
class PreprocessConfig:
    """What a document is made of, and what is done with a line that holds none."""

    append_eod: bool = field(default=False, metadata={"help": "end every document with the end-of-document token"})
    prepend_bos: bool = field(default=False, metadata={"help": "begin every document with the bos token"})
    split_sentences: bool = field(
        default=False, metadata={"help": "one sequence per sentence, for BERT; the files are named <key>_sentence"}
    )
    keep_newlines: bool = field(
        default=False, metadata={"help": "with --split_sentences: line breaks stay at the end of their sentence"}
    )
    lang: Literal["english"] = field(
        default="english", metadata={"help": "with --split_sentences: whose abbreviations end no sentence"}
    )
    workers: int | None = field(
        default=None, metadata={"help": "threads; the output is the same for any number; default: one per core"}
    )
    chunk_size: int = field(default=4096, metadata={"help": "most documents a thread takes at a time"})
    on_error: Literal["fail", "skip"] = field(
        default="fail", metadata={"help": "on a line that holds no document: end with its place, or show it and go on"}
    )
    resume: bool = field(
        default=False, metadata={"help": "go on where an earlier run of the same command was interrupted"}
    )
    tokenizer_backend: Literal["auto", "gigatoken", "reference"] = field(
        default="auto",
        metadata={
            "help": "what computes the ids: the tokenizer's own library (reference), gigatoken, or gigatoken where it "
            "is installed and agrees with the library (auto)"
        },
    )

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers} cannot do any work; give 1 or more threads.")
        if self.chunk_size < 1:
            raise ConfigError(f"--chunk_size {self.chunk_size} is not a number of documents; give 1 or more.")
        if self.keep_newlines and not self.split_sentences:
            raise ConfigError("--keep_newlines is about the ends of sentences; give --split_sentences too, or drop it.")

    @property
    def num_threads(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def level(self) -> str:
        """What a sequence of the dataset is; the end of the names of its files."""
        return "sentence" if self.split_sentences else "document"
