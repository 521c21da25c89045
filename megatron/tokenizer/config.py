"""Which tokenizer a command uses: the flags of every entry point that reads or writes text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron.errors import ConfigError


@dataclass(frozen=True)
class TokenizerConfig:
    """The files and additions that define a tokenizer; `build_tokenizer` loads it.

    Entries of `vocab_extra_ids_list` are cut at commas, so that the single string of a command line and a
    list from a file mean the same.
    """

    # A plain string: the types that other programs know get an answer that names what to use here.
    tokenizer_type: str | None = field(
        default=None,
        metadata={
            "help": "SentencePieceTokenizer, HuggingFaceTokenizer, GPT2BPETokenizer, FalconTokenizer, TikTokenizer, "
            "BertWordPieceLowerCase, BertWordPieceCase or NullTokenizer (data that is tokenized already); default: by "
            "the kind of file given"
        },
    )
    tokenizer_model: str | None = field(
        default=None,
        metadata={
            "help": "the tokenizer's file or folder: SentencePiece tokenizer.model, Hugging Face tokenizer.json, "
            "Llama 3's tokenizer.model or another file of tiktoken ranks, vocab.json and merges.txt, BERT's vocab.txt"
        },
    )
    vocab_file: str | None = field(default=None, metadata={"help": "another name for --tokenizer_model"})
    merge_file: str | None = field(
        default=None,
        metadata={
            "help": "GPT2BPETokenizer: merges.txt; --vocab_file is its vocab.json then; default: the one beside it"
        },
    )
    tiktoken_encoding: Literal["llama3", "cl100k", "o200k", "gpt2"] | None = field(
        default=None,
        metadata={"help": "TikTokenizer: how text is cut into words; default: by the number of ranks in the file"},
    )
    vocab_extra_ids: int = field(
        default=0, metadata={"help": "number of tokens <extra_id_0>, <extra_id_1>, ... to add"}
    )
    vocab_extra_ids_list: tuple[str, ...] = field(
        default=(), metadata={"help": 'comma-separated tokens to add, which text may contain: "[formula],[/formula]"'}
    )
    no_new_tokens: bool = field(
        default=False,
        metadata={
            "help": "SentencePieceTokenizer: add none of <CLS>, <SEP>, <EOD>, <MASK>, <PAD>; documents end with eos"
        },
    )
    vocab_size: int | None = field(default=None, metadata={"help": "NullTokenizer: its number of ids"})
    parse_special: bool = field(
        default=False,
        metadata={"help": "turn special tokens that text spells out (</s>, <CLS>, ...) into their ids; default: text"},
    )

    def __post_init__(self) -> None:
        tokens = tuple(token for entry in self.vocab_extra_ids_list for token in entry.split(","))
        object.__setattr__(self, "vocab_extra_ids_list", tokens)
        if any(not token.strip() for token in tokens):
            raise ConfigError(
                f"--vocab_extra_ids_list {','.join(tokens)!r} has an empty token; separate tokens by one comma."
            )
        repeated = sorted({token for token in tokens if tokens.count(token) > 1})
        if repeated:
            raise ConfigError(f"--vocab_extra_ids_list names {repeated[0]!r} more than once; name every token once.")
        if self.vocab_extra_ids < 0:
            raise ConfigError(f"--vocab_extra_ids {self.vocab_extra_ids} is negative; it is a number of tokens to add.")
        if self.merge_file is not None and self.tokenizer_type not in (None, "GPT2BPETokenizer"):
            raise ConfigError(
                f"--merge_file {self.merge_file} is for GPT2BPETokenizer, and --tokenizer_type is "
                f"{self.tokenizer_type}; drop one of them."
            )
        if self.merge_file is not None and self.path is None:
            raise ConfigError(f"--merge_file {self.merge_file} needs its vocab.json; give --vocab_file too.")
        if self.tokenizer_model and self.vocab_file and self.tokenizer_model != self.vocab_file:
            raise ConfigError(
                f"--tokenizer_model {self.tokenizer_model} and --vocab_file {self.vocab_file} differ, and both name "
                "the tokenizer; give one of them."
            )
        path = self.path or ""
        if self.tokenizer_type == "GPT2BPETokenizer" and self.merge_file is None and path.endswith(".json"):
            object.__setattr__(self, "merge_file", str(Path(path).with_name("merges.txt")))

    @property
    def path(self) -> str | None:
        """The tokenizer's file or folder, under whichever of its two flags it was given."""
        return self.tokenizer_model or self.vocab_file
