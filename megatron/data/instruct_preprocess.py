"""From conversations in JSON lines to two datasets: tokens in ``<prefix>-text``, their roles in ``<prefix>-role``.

Both have one sequence per conversation and a document index of only [0], as Megatron-LLM writes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from megatron.data.chat_template import ChatTemplate, Part, build_template, control_ids, prepends_space
from megatron.data.conversation import Conversation, RecordKeys, read_conversations
from megatron.data.documents import Chunk, JsonLines, is_parquet, is_plain_text, read_chunks
from megatron.data.encoding import EncodedTexts
from megatron.data.indexed import best_dtype
from megatron.data.inputs import check_inputs
from megatron.data.jinja_template import JinjaTemplate, read_template
from megatron.data.ordered import map_in_order
from megatron.data.preprocess import Listeners, Progress
from megatron.data.unfinished import UnfinishedDatasets
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron.tokenizer.null import NullTokenizer
from megatron.tokenizer.special_tokens import TokenSplitter

ROLE_DTYPE = np.dtype(np.uint16)
# What a thread takes at a time, and what is read while one long conversation is tokenized.
CHUNK_BYTES = 64 * 1024
BYTES_AHEAD = 64 * 1024 * 1024


@dataclass(frozen=True)
class InstructConfig:
    """Where the conversations are in a record, how they are written, and what is done with lines that have none."""

    system_key: str | None = field(default=None, metadata={"help": "key of the system message; default: none is read"})
    question_key: str = field(default="input", metadata={"help": "key of the question"})
    answer_key: str = field(default="output", metadata={"help": "key of the answer"})
    chat_key: str | None = field(
        default=None,
        metadata={
            "help": "key of a list of messages with role and content, or from and value; default: messages or "
            "conversations, where a line has no question"
        },
    )
    chat_template: Literal["chatml", "llama2", "llama3", "tokenizer"] = field(
        default="chatml", metadata={"help": "how a conversation is written; tokenizer: with its own Jinja template"}
    )
    chat_template_file: str | None = field(
        default=None, metadata={"metavar": "PATH", "help": "a Jinja template, in place of the tokenizer's own"}
    )
    role_names: tuple[str, ...] = field(
        default=("system", "question", "answer"),
        metadata={
            "metavar": "NAME",
            "help": "names of system, user and assistant in chatml; the default is Megatron-LLM's, most models say "
            "system user assistant",
        },
    )
    workers: int | None = field(
        default=None, metadata={"help": "threads; the output is the same for any number; default: one per core"}
    )
    chunk_size: int = field(default=4096, metadata={"help": "most conversations a thread takes at a time"})
    on_error: Literal["fail", "skip"] = field(
        default="fail", metadata={"help": "on a line that holds no conversation: end with its place, or go on"}
    )

    def __post_init__(self) -> None:
        if len(self.role_names) != 3:
            raise ConfigError(
                f"--role_names {' '.join(self.role_names)}: {len(self.role_names)} names, and there are three roles; "
                "give those of system, user and assistant."
            )
        if self.chat_template != "chatml" and self.role_names != InstructConfig.role_names:
            raise ConfigError(
                f"--role_names {' '.join(self.role_names)} is not used with --chat_template {self.chat_template}, "
                "which has its own names; give --chat_template chatml, or drop it."
            )
        if self.chat_template_file is not None and self.chat_template != "tokenizer":
            raise ConfigError(
                f"--chat_template_file {self.chat_template_file} is not used with --chat_template "
                f"{self.chat_template}; give --chat_template tokenizer, or drop it."
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers} cannot do any work; give 1 or more threads.")
        if self.chunk_size < 1:
            raise ConfigError(f"--chunk_size {self.chunk_size} is not a number of conversations; give 1 or more.")

    @property
    def num_threads(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def keys(self) -> RecordKeys:
        return RecordKeys(self.question_key, self.answer_key, self.system_key, self.chat_key)


def preprocess_conversations(
    inputs: Sequence[Path],
    output_prefix: str,
    tokenizer_config: TokenizerConfig,
    config: InstructConfig = InstructConfig(),
    *,
    tell: Listeners = Listeners(),  # noqa: B008 - immutable
) -> Progress:
    """Writes both datasets and returns the counts. With an error neither appears."""
    encode = conversation_encoder(tokenizer_config, config)
    total_bytes = check_inputs(inputs)
    unfit = [path for path in inputs if is_plain_text(path) or is_parquet(path)]
    if unfit:
        raise DataError(f"{unfit[0]}: conversations are read from JSON lines only; convert the file.")
    text, role = Path(f"{output_prefix}-text"), Path(f"{output_prefix}-role")
    progress = Progress(total_bytes=total_bytes)
    tell.progress(progress)
    # A reader opens the text first, so it comes first here: its names, given last, complete the pair.
    dtypes = (encode.dtype, ROLE_DTYPE)
    with UnfinishedDatasets((text, role), dtypes, {}, journal_interval_s=float("inf")) as datasets:
        datasets.open(None)
        for result in _encoded(inputs, encode, config):
            for error in result.errors:
                tell.bad(error)
            datasets.append((result.text, result.role), dict)
            progress = _advance(progress, result)
            tell.progress(progress)
        if progress.num_documents == 0:
            raise DataError(
                f"{', '.join(map(str, inputs))}: no conversation to tokenize ({progress.num_bad} bad lines, "
                f"{total_bytes} bytes); check --input."
            )
        datasets.finish()
    return progress


def _encoded(inputs: Sequence[Path], encode: ConversationEncoder, config: InstructConfig) -> Iterator[EncodedPair]:
    chunks = read_chunks(inputs, max_documents=config.chunk_size, max_bytes=CHUNK_BYTES)
    ahead = max(BYTES_AHEAD, 4 * config.num_threads * CHUNK_BYTES)
    with closing(
        map_in_order(encode, chunks, config.num_threads, max_ahead=ahead, weigh=lambda chunk: chunk.num_bytes)
    ) as results:
        yield from results


def _advance(progress: Progress, result: EncodedPair) -> Progress:
    return replace(
        progress,
        num_bytes=result.done_bytes,
        num_text_bytes=progress.num_text_bytes + result.num_bytes,
        num_documents=progress.num_documents + len(result.text.lengths),
        num_bad=progress.num_bad + len(result.errors),
        num_tokens=progress.num_tokens + len(result.text.tokens),
        longest_tokens=max(progress.longest_tokens, int(result.text.lengths.max(initial=0))),
    )


@dataclass(frozen=True)
class EncodedPair:
    """The conversations of one chunk: their tokens, the role of each, and the errors of lines that hold none."""

    text: EncodedTexts
    role: EncodedTexts
    errors: tuple[DataError, ...]
    num_bytes: int
    done_bytes: int


@dataclass(frozen=True)
class ConversationEncoder:
    """Encodes chunks; the same chunk always becomes the same arrays, in any thread."""

    template: ChatTemplate
    encode_texts: Callable[[Sequence[str]], list[np.ndarray]]
    keys: RecordKeys
    dtype: np.dtype
    skip_bad: bool

    def __call__(self, chunk: Chunk) -> EncodedPair:
        assert isinstance(chunk, JsonLines)
        errors: list[DataError] = []
        conversations = read_conversations(chunk, self.keys, errors.append if self.skip_bad else _raise)
        rendered = []
        for conversation in conversations:
            try:
                rendered.append(self.template.render(conversation.messages))
            except DataError as error:
                self._bad(chunk, conversation, error, errors)
        tokens, roles, lengths = self._encode(rendered)
        no_documents = np.empty(0, np.int32)
        return EncodedPair(
            EncodedTexts(tokens.astype(self.dtype, copy=False), lengths, no_documents),
            EncodedTexts(roles, lengths, no_documents),
            tuple(errors),
            chunk.num_bytes,
            chunk.done_bytes,
        )

    def _bad(self, chunk: Chunk, conversation: Conversation, error: DataError, errors: list[DataError]) -> None:
        placed = DataError(f"{chunk.place(conversation.line)}: {error}")
        if not self.skip_bad:
            raise placed from error
        errors.append(placed)

    def _encode(self, rendered: Sequence[Sequence[Part]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> tokens int32 [t], roles [t], lengths int32 [conversations]."""
        parts = [part for conversation in rendered for part in conversation]
        texts = iter(self.encode_texts([part.content for part in parts if isinstance(part.content, str)]))
        ids = [
            next(texts) if isinstance(part.content, str) else np.array([part.content], dtype=np.int32) for part in parts
        ]
        sizes = np.array([len(part) for part in ids], dtype=np.int32)
        first = np.concatenate(([0], np.cumsum([len(conversation) for conversation in rendered], dtype=np.int64)))
        ends = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        return (
            np.concatenate(ids) if ids else np.empty(0, np.int32),
            np.repeat(np.array([part.role for part in parts], dtype=ROLE_DTYPE), sizes),
            np.diff(ends[first]).astype(np.int32),
        )


def _raise(error: DataError) -> None:
    raise error


def conversation_encoder(tokenizer_config: TokenizerConfig, config: InstructConfig) -> ConversationEncoder:
    """Raises ConfigError where the tokenizer has not what the template needs."""
    tokenizer = build_tokenizer(tokenizer_config)
    if isinstance(tokenizer, NullTokenizer):
        raise ConfigError("NullTokenizer writes no conversations, since it has no text; give --tokenizer_model.")
    controls = control_ids(build_tokenizer(replace(tokenizer_config, parse_special=True)))
    template = _template(tokenizer, tokenizer_config, config, controls)
    return ConversationEncoder(
        template,
        _TextEncoder(tokenizer, tokenizer_config, template.control_tokens),
        config.keys,
        best_dtype(tokenizer.vocab_size),
        skip_bad=config.on_error == "skip",
    )


def _template(
    tokenizer: Tokenizer, tokenizer_config: TokenizerConfig, config: InstructConfig, controls: Mapping[str, int]
) -> ChatTemplate:
    if config.chat_template != "tokenizer":
        system, user, assistant = config.role_names
        return build_template(config.chat_template, tokenizer, controls, (system, user, assistant))
    file = None if config.chat_template_file is None else Path(config.chat_template_file)
    source, names = read_template(file, tokenizer_config.path)
    return JinjaTemplate(source, names, controls, drop_space=prepends_space(tokenizer))


class _TextEncoder:
    """Encodes text in which the template's control tokens, added ones too, are only words.

    The tokenizer finds tokens of --vocab_extra_ids_list in text. Where those of the template stand in one, it goes to
    a tokenizer without additions, and the other additions are found here.
    """

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig, control_tokens: frozenset[str]):
        self._tokenizer = tokenizer
        added = {name: tokenizer.added_tokens[name] for name in config.vocab_extra_ids_list}
        self._guarded = () if config.parse_special else tuple(control_tokens & added.keys())
        self._plain = build_tokenizer(replace(config, vocab_extra_ids_list=())) if self._guarded else tokenizer
        self._splitter = TokenSplitter({name: i for name, i in added.items() if name not in control_tokens})

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch(texts)
        for number, text in enumerate(texts):
            if any(name in text for name in self._guarded):
                pieces = self._splitter.split(text)
                ids = [[piece] if isinstance(piece, int) else self._plain.encode(piece) for piece in pieces]
                encoded[number] = np.array([i for piece in ids for i in piece], dtype=np.int32)
        return encoded
