"""Documents in files: JSON lines, one object per line, plain text, and parquet, one document per row.

A .txt file is cut into documents at runs of two or more blank lines (chapters, articles); without such a
run it is one document. A .parquet file has its texts in columns. Every other file is read as JSON lines.
All text is UTF-8.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron.data.inputs import check_inputs
from megatron.data.json_value import described, parse_json_line
from megatron.data.parquet import Rows, count_rows, read_rows
from megatron.data.text_stream import TextStream, base_suffix
from megatron.data.utf8 import decode_utf8, reason_and_remedy
from megatron.errors import DataError

__all__ = ["Chunk", "Document", "Position", "check_inputs", "is_plain_text", "parse_chunk", "read_chunks", "read_texts"]

OnBad = Callable[[DataError], None]
"""Called with the error of a record that holds no document."""


class Position(NamedTuple):
    """Where reading goes on: the number of the file, bytes of its unpacked text, and lines (or rows) before it."""

    file: int = 0
    offset: int = 0
    records: int = 0


class Document(NamedTuple):
    """The text under each key, and the line or row where the document starts."""

    number: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Chunk(ABC):
    """Some consecutive documents of one file, not decoded yet."""

    path: Path
    num_bytes: int
    """Bytes of unpacked text that the chunk covers, separators included."""
    done_bytes: int
    """Bytes of all files, as they are on disk, up to the end of the chunk."""
    start: Position
    end: Position

    def place(self, number: int) -> str:
        return f"{self.path}:{number}"

    @abstractmethod
    def documents(self, keys: Sequence[str], on_bad: OnBad) -> Iterator[Document]: ...


@dataclass(frozen=True)
class JsonLines(Chunk):
    lines: list[bytes]
    """With their ends, blank ones included."""

    def records(self) -> Iterator[tuple[int, bytes]]:
        """The number of every line that is not blank, and the line."""
        for line, raw in enumerate(self.lines, start=1 + self.start.records):
            if not raw.isspace():
                yield line, raw

    def documents(self, keys: Sequence[str], on_bad: OnBad) -> Iterator[Document]:
        for line, raw in self.records():
            try:
                yield Document(line, _parse_json_line(raw, self.path, line, keys))
            except DataError as error:
                on_bad(error)


@dataclass(frozen=True)
class PlainText(Chunk):
    records: tuple[tuple[int, bytes], ...]
    """The number of each document's first line, and its bytes."""

    def documents(self, keys: Sequence[str], on_bad: OnBad) -> Iterator[Document]:
        for line, raw in self.records:
            try:
                yield Document(line, (_without_outer_blank_lines(_decode(raw, self.path, line)),))
            except DataError as error:
                on_bad(error)


@dataclass(frozen=True)
class ParquetRows(Chunk):
    rows: Rows

    def place(self, number: int) -> str:
        return f"{self.path}, row {number}"

    def documents(self, keys: Sequence[str], on_bad: OnBad) -> Iterator[Document]:
        for row, texts in enumerate(zip(*self.rows.columns, strict=True), start=self.rows.first_row):
            present = tuple(text for text in texts if text is not None)
            if len(present) == len(texts):
                yield Document(row, present)
            else:
                key = keys[texts.index(None)]
                on_bad(DataError(f"{self.place(row)}: no text in UTF-8 under {key!r}; remove the row, or mend it."))


def read_chunks(
    paths: Sequence[Path],
    *,
    max_documents: int,
    max_bytes: int,
    keys: Sequence[str] = ("text",),
    start: Position = Position(),  # noqa: B008 - immutable
) -> Iterator[Chunk]:
    """The documents of all files in order, from `start` on. A chunk holds at most `max_documents`, and ends with the
    document that reaches `max_bytes`, so that all hold similar amounts of work."""
    sizes = [path.stat().st_size for path in paths]
    for number in range(start.file, len(paths)):
        at = start if number == start.file else Position(number)
        reader = _Reader(paths[number], number, sum(sizes[:number]), max_documents, max_bytes)
        try:
            yield from reader.rows(at, keys) if is_parquet(paths[number]) else reader.text(at)
        except OSError as error:
            raise DataError(f"cannot read {paths[number]}: {error.strerror}; check --input.") from error


def parse_chunk(chunk: Chunk, keys: Sequence[str], on_bad: OnBad | None = None) -> list[Document]:
    """The chunk's documents. A record without one raises `DataError` with file and line, or is told to `on_bad`."""
    return list(chunk.documents(keys, _raise if on_bad is None else on_bad))


def read_texts(paths: Sequence[Path], key: str) -> Iterator[str]:
    """The text of every document of all files, in order."""
    for chunk in read_chunks(paths, max_documents=1, max_bytes=1 << 16, keys=(key,)):
        for document in parse_chunk(chunk, (key,)):
            yield document.texts[0]


def is_plain_text(path: Path) -> bool:
    return base_suffix(path) == ".txt"


def is_parquet(path: Path) -> bool:
    return path.suffix in (".parquet", ".pq")


@dataclass(frozen=True)
class _Reader:
    """Cuts one file into chunks; `bytes_before` are those of the files before it."""

    path: Path
    number: int
    bytes_before: int
    max_documents: int
    max_bytes: int

    def text(self, at: Position) -> Iterator[Chunk]:
        with TextStream(self.path, at.offset) as stream:
            yield from self._plain(stream, at) if is_plain_text(self.path) else self._json(stream, at)

    def rows(self, at: Position, keys: Sequence[str]) -> Iterator[Chunk]:
        num_rows, file_bytes = count_rows(self.path), self.path.stat().st_size
        limits = {"max_rows": self.max_documents, "max_bytes": self.max_bytes}
        for rows in read_rows(self.path, keys, skip_rows=at.records, **limits):
            last = rows.first_row - 1 + len(rows.columns[0])
            done = self.bytes_before + file_bytes * last // num_rows
            start, at = at, Position(self.number, 0, last)
            yield ParquetRows(self.path, rows.num_bytes, done, start, at, rows)

    def _json(self, stream: TextStream, at: Position) -> Iterator[Chunk]:
        hint = max(1, self.max_bytes - 1)  # the line that goes beyond it is the last
        while lines := stream.readlines(hint):
            for first in range(0, len(lines), self.max_documents):
                part = lines[first : first + self.max_documents]
                num_bytes = sum(map(len, part))
                start, at = at, Position(self.number, at.offset + num_bytes, at.records + len(part))
                done = self.bytes_before + stream.file_position(at.offset)
                yield JsonLines(self.path, num_bytes, done, start, at, part)

    def _plain(self, stream: TextStream, at: Position) -> Iterator[Chunk]:
        for records, num_bytes, num_lines in self._gather(_plain_text_records(stream, at.records)):
            start, at = at, Position(self.number, at.offset + num_bytes, at.records + num_lines)
            done = self.bytes_before + stream.file_position(at.offset)
            yield PlainText(self.path, num_bytes, done, start, at, records)

    def _gather(self, records: Iterator[tuple[int, bytes]]) -> Iterator[tuple[tuple[tuple[int, bytes], ...], int, int]]:
        """Documents of one chunk, and their bytes and lines, blank ones included."""
        chunk: list[tuple[int, bytes]] = []
        num_bytes = num_lines = 0
        for line, raw in records:
            num_bytes += len(raw)
            num_lines += raw.count(b"\n")
            if not raw.isspace():
                chunk.append((line, raw))
            if len(chunk) >= self.max_documents or num_bytes >= self.max_bytes:
                yield tuple(chunk), num_bytes, num_lines
                chunk, num_bytes, num_lines = [], 0, 0
        if num_bytes:
            yield tuple(chunk), num_bytes, num_lines


def _plain_text_records(lines: Iterator[bytes], num_lines_before: int) -> Iterator[tuple[int, bytes]]:
    document: list[bytes] = []
    first_line = num_lines_before + 1
    num_blank = 0
    for number, line in enumerate(lines, start=first_line):
        is_blank = line.isspace()
        if not is_blank and num_blank >= 2 and document:
            yield first_line, b"".join(document)
            document, first_line = [], number
        num_blank = num_blank + 1 if is_blank else 0
        document.append(line)
    if document:
        yield first_line, b"".join(document)


def _parse_json_line(raw: bytes, path: Path, line: int, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        value = parse_json_line(raw, is_first=line == 1)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, path, line) from error
    except ValueError as error:
        raise DataError(f"{path}:{line}: not JSON ({error}); every line must be one JSON object.") from error
    except RecursionError as error:
        raise DataError(
            f"{path}:{line}: not readable as JSON (nested too deeply); every line must be one object."
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path}:{line}: {described(value)}, not a JSON object; write it as {{{json.dumps(keys[0])}: ...}}."
        )
    texts = tuple(_text_under(value, key, path, line) for key in keys)
    # Only an escape can make half a surrogate pair: the decoder refuses one that is spelled out.
    if not all(map(str.isascii, texts)) and b"\\u" in raw:
        _refuse_surrogates(keys, texts, path, line)
    return texts


def _text_under(record: dict[str, object], key: str, path: Path, line: int) -> str:
    if key not in record:
        raise DataError(
            f"{path}:{line}: no key {key!r}, the object has {', '.join(map(repr, record)) or 'none'}; "
            "name the keys that hold text with --json_keys."
        )
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{path}:{line}: {key!r} holds {described(text)}, not a string; --json_keys names text only.")
    return text


def _refuse_surrogates(keys: Sequence[str], texts: Sequence[str], path: Path, line: int) -> None:
    for key, text in zip(keys, texts, strict=True):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}:{line}: {key!r} holds half a surrogate pair ({text[error.start]!a}), which no text contains; "
                "repair or remove the line."
            ) from error


def _without_outer_blank_lines(text: str) -> str:
    return re.sub(r"\A\s*\n", "", text.replace("\r\n", "\n")).rstrip()


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return decode_utf8(raw, is_first=line == 1)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, path, line) from error


def _not_utf8(error: UnicodeDecodeError, path: Path, first_line: int) -> DataError:
    line = first_line + error.object[: error.start].count(b"\n")
    return DataError(f"{path}:{line}: {reason_and_remedy(error, is_first=first_line == 1)}")


def _raise(error: DataError) -> None:
    raise error
