"""Documents in text files: JSON lines, one object per line, and plain text.

A .txt file is cut into documents at runs of two or more blank lines (chapters, articles); without such a
run it is one document. Every other file is read as JSON lines. All text is UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import DataError

COMPRESSED_OR_BINARY = (".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet", ".arrow")


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents of one file, not decoded yet: the number of each one's first line, and its bytes."""

    path: Path
    records: tuple[tuple[int, bytes], ...]
    num_bytes: int
    """Bytes of the file that the chunk covers, separators included."""

    @property
    def is_plain_text(self) -> bool:
        return _is_plain_text(self.path)


def check_inputs(paths: Sequence[Path]) -> int:
    """The size of all files in bytes. Raises `DataError` for one that cannot be read as text."""
    total_bytes = 0
    for path in paths:
        if path.suffix in COMPRESSED_OR_BINARY:
            raise DataError(
                f"{path} is not a text file by its name ({path.suffix}); unpack it to .jsonl or .txt first."
            )
        if path.is_dir():
            raise DataError(f"{path} is a folder; name the files in it, for example {path}/*.jsonl.")
        try:
            with path.open("rb"):
                total_bytes += path.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; check --input.") from error
    return total_bytes


def read_chunks(paths: Sequence[Path], *, max_documents: int, max_bytes: int) -> Iterator[Chunk]:
    """The documents of all files in order. A chunk ends at either limit, so that one holds similar amounts of work."""
    for path in paths:
        with path.open("rb") as file:
            records = _plain_text_records(file) if _is_plain_text(path) else _json_line_records(file)
            yield from _gather(path, records, max_documents, max_bytes)


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """For every document its text under each key. Raises `DataError` with file and line."""
    if chunk.is_plain_text:
        return [(_without_outer_blank_lines(_decode(raw, chunk.path, line)),) for line, raw in chunk.records]
    return [_parse_json_line(raw, chunk.path, line, keys) for line, raw in chunk.records]


def read_texts(paths: Sequence[Path], key: str) -> Iterator[str]:
    """The text of every document of all files, in order."""
    for chunk in read_chunks(paths, max_documents=1, max_bytes=1):
        for (text,) in parse_chunk(chunk, (key,)):
            yield text


def _is_plain_text(path: Path) -> bool:
    return path.suffix == ".txt"


def _json_line_records(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    return enumerate(lines, start=1)


def _plain_text_records(lines: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    document: list[bytes] = []
    first_line = 1
    num_blank = 0
    for number, line in enumerate(lines, start=1):
        is_blank = not line.strip()
        if not is_blank and num_blank >= 2 and document:
            yield first_line, b"".join(document)
            document, first_line = [], number
        num_blank = num_blank + 1 if is_blank else 0
        document.append(line)
    if document:
        yield first_line, b"".join(document)


def _gather(path: Path, records: Iterator[tuple[int, bytes]], max_documents: int, max_bytes: int) -> Iterator[Chunk]:
    chunk: list[tuple[int, bytes]] = []
    num_bytes = 0
    for line, raw in records:
        num_bytes += len(raw)
        if raw.strip():  # blank lines are no documents
            chunk.append((line, raw))
        if len(chunk) >= max_documents or num_bytes >= max_bytes:
            yield Chunk(path, tuple(chunk), num_bytes)
            chunk, num_bytes = [], 0
    if num_bytes:
        yield Chunk(path, tuple(chunk), num_bytes)


def _parse_json_line(raw: bytes, path: Path, line: int, keys: Sequence[str]) -> tuple[str, ...]:
    where = f"{path}:{line}"
    text = _decode(raw, path, line)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); every line must be one JSON object.") from error
    except RecursionError as error:
        raise DataError(f"{where}: not readable as JSON (nested too deeply); every line must be one object.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a {type(value).__name__}, not a JSON object; write it as {{{keys[0]!r}: ...}}.")
    return tuple(_text_under(value, key, where) for key in keys)


def _text_under(record: dict[str, object], key: str, where: str) -> str:
    if key not in record:
        raise DataError(
            f"{where}: no key {key!r}, the object has {', '.join(map(repr, record)) or 'none'}; "
            "name the keys that hold text with --json_keys."
        )
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} holds a {type(text).__name__}, not a string; --json_keys names text only.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key!r} holds half a surrogate pair ({text[error.start]!a}), which no text contains; "
            "repair or remove the line."
        ) from error
    return text


def _without_outer_blank_lines(text: str) -> str:
    return re.sub(r"\A\s*\n", "", text.replace("\r\n", "\n")).rstrip()


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        # A byte-order mark is no part of the text; only the first line can have one.
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        raise DataError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file, for example with "
            f"`iconv -f latin1 -t utf-8`."
        ) from error
