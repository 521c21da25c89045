"""From text files to tokenized datasets: read, tokenize in threads, write in the order of the input.

Tokenizers compute outside the interpreter lock, so threads are enough: nothing is pickled, no process can
die unseen, and the order of writing does not depend on their number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron.data.documents import Chunk, check_inputs, parse_chunk, read_chunks
from megatron.data.indexed import IndexedDatasetWriter, best_dtype
from megatron.errors import ConfigError, DataError, TokenizerError
from megatron.tokenizer.protocol import TokenArray, Tokenizer

# About a tenth of a second of work: many chunks keep all threads busy to the end, also among long documents.
MAX_CHUNK_BYTES = 256 * 1024
CHUNKS_AHEAD_PER_WORKER = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far a run is: input bytes, documents kept, documents dropped, and tokens of all keys."""

    num_bytes: int = 0
    total_bytes: int = 0
    num_documents: int = 0
    num_dropped: int = 0
    num_tokens: int = 0
    longest_tokens: int = 0


@dataclass(frozen=True)
class _TokenizedChunk:
    """Per kept document one array for every key."""

    documents: list[tuple[TokenArray, ...]]
    num_dropped: int
    num_bytes: int


def preprocess_files(
    inputs: Sequence[Path],
    prefixes: Mapping[str, Path],
    tokenizer: Tokenizer,
    *,
    append_eod: bool = False,
    workers: int = 1,
    chunk_size: int = 256,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Tokenizes every document and writes the text under each key of `prefixes` to its dataset; returns the counts.

    A document whose text is empty under any of the keys is dropped from all of them, so that the datasets
    of several keys stay aligned. With an error no dataset appears. `report` is called after every chunk of
    at most `chunk_size` documents.
    """
    keys = tuple(prefixes)
    _check_request(inputs, tokenizer, keys, append_eod, workers, chunk_size)
    progress = Progress(total_bytes=check_inputs(inputs))
    eod = tokenizer.eod if append_eod else None
    chunks = read_chunks(inputs, max_documents=chunk_size, max_bytes=MAX_CHUNK_BYTES)

    def tokenize(chunk: Chunk) -> _TokenizedChunk:
        return _tokenize(chunk, tokenizer, keys, eod)

    with ExitStack() as writers_open, closing(map_in_order(tokenize, chunks, workers)) as results:
        dtype = best_dtype(tokenizer.vocab_size)
        writers = [writers_open.enter_context(IndexedDatasetWriter(prefix, dtype)) for prefix in prefixes.values()]
        for result in results:
            for document in result.documents:
                for writer, ids in zip(writers, document, strict=True):
                    writer.add_document(ids)
            progress = _advance(progress, result)
            report(progress)
        if progress.num_documents == 0:
            names = ", ".join(map(str, inputs))
            raise DataError(
                f"{names}: no text to tokenize ({progress.num_dropped} empty documents, "
                f"{progress.total_bytes} bytes); check --input and --json_keys."
            )
    return progress


def tokenize_file(file: Path, prefix: Path, tokenizer: Tokenizer, *, json_key: str = "text", workers: int = 1) -> None:
    """Tokenizes one text file for pre-training: every document ends with eod where the tokenizer has one."""
    preprocess_files([file], {json_key: prefix}, tokenizer, append_eod=tokenizer.eod is not None, workers=workers)


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """`map(work, items)` in `workers` threads with a bounded number of items ahead; the first failure ends it."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) >= CHUNKS_AHEAD_PER_WORKER * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _tokenize(chunk: Chunk, tokenizer: Tokenizer, json_keys: Sequence[str], eod: int | None) -> _TokenizedChunk:
    try:
        documents = [texts for texts in parse_chunk(chunk, json_keys) if all(texts)]
        flat = tokenizer.encode_batch([text for texts in documents for text in texts])
    except TokenizerError as error:  # ids that are no ids, say: the text is at fault, so the place is told
        first, last = chunk.records[0][0], chunk.records[-1][0]
        raise DataError(f"{chunk.path}, lines {first} to {last}: {error}") from error
    width = len(json_keys)
    tokenized = [tuple(flat[start : start + width]) for start in range(0, len(flat), width)]
    # A text of blanks can have no tokens: it is as empty as one without characters.
    kept = [document for document in tokenized if all(len(ids) for ids in document)]
    if eod is not None:
        kept = [tuple(np.append(ids, np.int32(eod)) for ids in document) for document in kept]
    return _TokenizedChunk(kept, num_dropped=len(chunk.records) - len(kept), num_bytes=chunk.num_bytes)


def _advance(progress: Progress, result: _TokenizedChunk) -> Progress:
    lengths = [len(ids) for document in result.documents for ids in document]
    return Progress(
        num_bytes=progress.num_bytes + result.num_bytes,
        total_bytes=progress.total_bytes,
        num_documents=progress.num_documents + len(result.documents),
        num_dropped=progress.num_dropped + result.num_dropped,
        num_tokens=progress.num_tokens + sum(lengths),
        longest_tokens=max([progress.longest_tokens, *lengths]),
    )


def _check_request(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    json_keys: Sequence[str],
    append_eod: bool,
    workers: int,
    chunk_size: int,
) -> None:
    if workers < 1:
        raise ConfigError(f"--workers {workers} cannot do any work; give 1 or more threads.")
    if chunk_size < 1:
        raise ConfigError(f"--chunk_size {chunk_size} is not a number of documents; give 1 or more.")
    plain_text = [path for path in inputs if path.suffix == ".txt"]
    if len(json_keys) > 1 and plain_text:
        raise ConfigError(
            f"--json_keys {' '.join(json_keys)}: {plain_text[0]} is plain text and has no keys; "
            "give one key, which then only names the output."
        )
    if append_eod and tokenizer.eod is None:
        raise ConfigError(
            f"--append_eod: the {tokenizer.name} has no end-of-document token; drop the flag, or use a tokenizer whose "
            "files name an eos_token."
        )
