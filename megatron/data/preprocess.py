"""From text files to tokenized datasets: read, tokenize in threads, write in the order of the input.

Tokenizers compute outside the interpreter lock, so threads are enough: nothing is pickled, no process can
die unseen, and what is written does not depend on their number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.data.documents import Chunk, Position, is_plain_text, parse_chunk, read_chunks
from megatron.data.encoding import ChunkEncoder, EncodeBatch, EncodedChunk
from megatron.data.indexed import best_dtype
from megatron.data.inputs import check_inputs, identify_input
from megatron.data.journal import Journal
from megatron.data.ordered import map_in_order
from megatron.data.preprocess_config import PreprocessConfig
from megatron.data.sentences import split_sentences
from megatron.data.unfinished import JOURNAL_INTERVAL_S, UnfinishedDatasets
from megatron.errors import ConfigError, DataError, TokenizerError
from megatron.tokenizer.gigatoken import FastTokenizerMismatch, FastTokenizerUnavailable, GigatokenEncoder
from megatron.tokenizer.protocol import TokenArray, Tokenizer

# A chunk is work for a few hundredths of a second, so that no thread is left alone with a long last one: of a
# tokenizer's own library, and of gigatoken.
REFERENCE_CHUNK_BYTES, FAST_CHUNK_BYTES = 64 * 1024, 256 * 1024
# Text that is read while one long document is tokenized, so that the other threads have work meanwhile.
MAX_BYTES_AHEAD = 64 * 1024 * 1024
SAMPLE_BYTES = 64 * 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is: bytes of the input files, bytes of the text in them, and counts.

    `num_dropped` documents were empty, `num_bad` lines held none; `longest_tokens` is of a document under one key.
    """

    num_bytes: int = 0
    total_bytes: int = 0
    num_text_bytes: int = 0
    num_documents: int = 0
    num_dropped: int = 0
    num_bad: int = 0
    num_tokens: int = 0
    longest_tokens: int = 0


@dataclass(frozen=True)
class Listeners:
    """Whoever wants to know: `progress` is told how far a run is, first of all and then after every chunk, `bad` the
    error of a line that is skipped, `backend` what computes the ids."""

    progress: Callable[[Progress], None] = lambda progress: None
    bad: Callable[[DataError], None] = lambda error: None
    backend: Callable[[str], None] = lambda name: None


def preprocess_files(
    inputs: Sequence[Path],
    prefixes: Mapping[str, Path],
    tokenizer: Tokenizer,
    config: PreprocessConfig = PreprocessConfig(),  # noqa: B008 - immutable
    *,
    tell: Listeners = Listeners(),
    journal_interval_s: float = JOURNAL_INTERVAL_S,
) -> Progress:
    """Tokenizes every document and writes the text under each key of `prefixes` to its dataset; returns the counts.

    A document whose text is empty under any of the keys is dropped from all of them, so that the datasets
    of several keys stay aligned. With an error no dataset appears; what a run that had a journal by then has done
    is kept for one with `config.resume`.
    """
    keys = tuple(prefixes)
    _check_request(inputs, tokenizer, keys, config)
    total_bytes = check_inputs(inputs)
    dtypes = [best_dtype(tokenizer.vocab_size)] * len(prefixes)
    request = _request(inputs, keys, tokenizer, config)
    job = _Job(tuple(inputs), keys, tokenizer, config, tell)
    with UnfinishedDatasets(
        tuple(prefixes.values()), dtypes, request, journal_interval_s=journal_interval_s
    ) as datasets:
        journal = _journal_to_continue(datasets, request, resume=config.resume)
        start = _Start.of(journal, total_bytes)
        encode = None if start.without_fast else job.fast_encoder()
        datasets.open(journal)
        try:
            progress = job.write(datasets, encode, start)
        except FastTokenizerMismatch as error:
            datasets.restart()  # what differs here may have differed before
            if config.tokenizer_backend == "gigatoken":
                raise TokenizerError(f"{error}; use --tokenizer_backend auto.") from error
            logger.warning("%s; everything is tokenized again, by the tokenizer's own library.", error)
            progress = job.write(datasets, None, _Start(Progress(total_bytes=total_bytes), without_fast=True))
        _require_text(inputs, progress)
        datasets.finish()
    return progress


def tokenize_file(file: Path, prefix: Path, tokenizer: Tokenizer, *, json_key: str = "text", workers: int = 1) -> None:
    """Tokenizes one text file for pre-training: every document ends with eod where the tokenizer has one.

    An interrupted run is not continued: the caller gives a `prefix` of its own to each.
    """
    config = PreprocessConfig(append_eod=tokenizer.eod is not None, workers=workers)
    preprocess_files([file], {json_key: prefix}, tokenizer, config, journal_interval_s=float("inf"))


@dataclass(frozen=True)
class _Start:
    """Where a run starts: the counts up to there, the position, and whether gigatoken was found wrong before."""

    progress: Progress
    position: Position = Position()  # noqa: RUF009 - immutable
    without_fast: bool = False

    @classmethod
    def of(cls, journal: Journal | None, total_bytes: int) -> _Start:
        if journal is None:
            return cls(Progress(total_bytes=total_bytes))
        notes = journal.notes
        return cls(Progress(**notes["progress"]), Position(*notes["position"]), bool(notes["without_fast"]))

    def notes(self, progress: Progress, position: Position) -> dict[str, Any]:
        return {"progress": asdict(progress), "position": list(position), "without_fast": self.without_fast}


@dataclass(frozen=True)
class _Job:
    inputs: tuple[Path, ...]
    keys: tuple[str, ...]
    tokenizer: Tokenizer
    config: PreprocessConfig
    tell: Listeners

    def write(self, datasets: UnfinishedDatasets, fast: GigatokenEncoder | None, start: _Start) -> Progress:
        """Appends everything from `start` on; returns the counts at the end."""
        self.tell.backend("" if fast is None else "gigatoken")
        progress = start.progress
        self.tell.progress(progress)
        work = self._chunk_encoder(self._reference_batch if fast is None else fast.encode_batch)
        chunk_bytes = REFERENCE_CHUNK_BYTES if fast is None else FAST_CHUNK_BYTES
        chunks = self._chunks(chunk_bytes, start.position)
        threads = self.config.num_threads
        ahead = max(MAX_BYTES_AHEAD, 4 * threads * chunk_bytes)
        with closing(map_in_order(work, chunks, threads, max_ahead=ahead, weigh=lambda c: c.num_bytes)) as results:
            for result in results:
                for error in result.errors:
                    self.tell.bad(error)
                progress = _advance(progress, result)
                datasets.append(result.texts, partial(start.notes, progress, result.end))
                self.tell.progress(progress)
        return progress

    def fast_encoder(self) -> GigatokenEncoder | None:
        if self.config.tokenizer_backend == "reference":
            return None
        try:
            return GigatokenEncoder(self.tokenizer, num_threads=self.config.num_threads, sample=self._sample())
        except FastTokenizerUnavailable as reason:
            if self.config.tokenizer_backend == "gigatoken":
                raise TokenizerError(f"--tokenizer_backend gigatoken: {reason}; or use auto.") from reason
            logger.info("gigatoken is not used: %s", reason)
            return None

    def _chunks(self, max_bytes: int, start: Position) -> Iterator[Chunk]:
        max_documents = self.config.chunk_size
        return read_chunks(self.inputs, keys=self.keys, max_documents=max_documents, max_bytes=max_bytes, start=start)

    def _chunk_encoder(self, encode_batch: EncodeBatch) -> ChunkEncoder:
        split = partial(split_sentences, keep_newlines=self.config.keep_newlines)
        return ChunkEncoder(
            encode_batch,
            self.keys,
            self.tokenizer.vocab_size,
            best_dtype(self.tokenizer.vocab_size),
            bos=self.tokenizer.bos if self.config.prepend_bos else None,
            eod=self.tokenizer.eod if self.config.append_eod else None,
            split=split if self.config.split_sentences else None,
            skip_bad=self.config.on_error == "skip",
        )

    def _reference_batch(self, texts: Sequence[str], seed: int) -> list[TokenArray]:
        return self.tokenizer.encode_batch(texts)

    def _sample(self) -> list[str]:
        """The first documents of the input."""
        first = next(self._chunks(SAMPLE_BYTES, Position()), None)
        documents = parse_chunk(first, self.keys, on_bad=lambda error: None) if first is not None else []
        return [text for document in documents for text in document.texts]


def _advance(progress: Progress, result: EncodedChunk) -> Progress:
    return Progress(
        num_bytes=result.done_bytes,
        total_bytes=progress.total_bytes,
        num_text_bytes=progress.num_text_bytes + result.num_bytes,
        num_documents=progress.num_documents + result.num_documents,
        num_dropped=progress.num_dropped + result.num_dropped,
        num_bad=progress.num_bad + len(result.errors),
        num_tokens=progress.num_tokens + sum(len(text.tokens) for text in result.texts),
        longest_tokens=max(progress.longest_tokens, result.longest_tokens),
    )


def _request(
    inputs: Sequence[Path], keys: tuple[str, ...], tokenizer: Tokenizer, config: PreprocessConfig
) -> dict[str, Any]:
    """Everything that decides what is written, under the names by which a message speaks of it."""
    return {
        "--input": [asdict(identify_input(path)) for path in inputs],
        "--json_keys": list(keys),
        "the tokenizer": tokenizer.identity.fingerprint,
        "--append_eod": config.append_eod,
        "--prepend_bos": config.prepend_bos,
        "--split_sentences": [config.split_sentences, config.keep_newlines, config.lang],
        "--on_error": config.on_error,
    }


def _journal_to_continue(datasets: UnfinishedDatasets, request: dict[str, Any], *, resume: bool) -> Journal | None:
    journal = datasets.read_journal()
    if journal is None:
        return None
    folders = " and ".join(map(str, datasets.folders))
    if not resume:
        raise ConfigError(
            f"{folders}: an interrupted run; continue it with --resume, or remove {folders} to start from nothing."
        )
    # A run that ended at a bad line may go on without it.
    changed = [name for name in request if name != "--on_error" and journal.request.get(name) != request[name]]
    if changed:
        raise ConfigError(
            f"--resume: {changed[0]} is not what it was when the run in {folders} was interrupted; give the same "
            f"command and files, or remove {folders} to start from nothing."
        )
    return journal


def _require_text(inputs: Sequence[Path], progress: Progress) -> None:
    if progress.num_documents == 0:
        raise DataError(
            f"{', '.join(map(str, inputs))}: no text to tokenize ({progress.num_dropped} empty documents, "
            f"{progress.num_bad} bad lines, {progress.total_bytes} bytes); check --input and --json_keys."
        )


def _check_request(
    inputs: Sequence[Path], tokenizer: Tokenizer, keys: tuple[str, ...], config: PreprocessConfig
) -> None:
    plain_text = [path for path in inputs if is_plain_text(path)]
    if len(keys) > 1 and plain_text:
        raise ConfigError(
            f"--json_keys {' '.join(keys)}: {plain_text[0]} is plain text and has no keys; "
            "give one key, which then only names the output."
        )
    if config.append_eod and tokenizer.eod is None:
        raise ConfigError(
            f"--append_eod: the {tokenizer.name} has no end-of-document token; drop the flag, or use a tokenizer whose "
            "files name an eos_token."
        )
    if config.prepend_bos and tokenizer.bos is None:
        raise ConfigError(
            f"--prepend_bos: the {tokenizer.name} has no bos token; drop the flag, or use a tokenizer whose files name "
            "a bos_token."
        )
