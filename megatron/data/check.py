"""Every fault of a tokenized dataset with its position: what opening refuses, and what only training would find.

Unlike `index_file.read_index`, which stops at the first contradiction, this goes on as far as the rest makes sense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from megatron.data.data_file import DataFile, find_file
from megatron.data.index_file import CHUNK_SEQUENCES, DTYPE_CODES, HEADER, LEGACY_MAGIC, MAGIC, file_name
from megatron.data.indexed import IndexedDataset, name_of
from megatron.data.object_store import ObjectStore, is_remote
from megatron.errors import DataError

_MAX_NAMED: Final = 10
_TOKENS_AT_ONCE: Final = 1 << 20
_ROLES: Final = 3  # system, prompter, assistant


@dataclass(frozen=True)
class Finding:
    """`is_fault`: the data is wrong or unreadable; else it is harmless, but worth a word."""

    text: str
    is_fault: bool = True


def check_dataset(prefix: str | Path, vocab_size: int | None = None) -> Iterator[Finding]:
    """What is wrong with ``prefix.bin`` and ``prefix.idx``, or with both pairs of instruction data at ``prefix``."""
    prefix, store = name_of(prefix), ObjectStore()
    text, role = f"{prefix}-text", f"{prefix}-role"
    if find_file(f"{text}.idx", store) is not None and find_file(f"{prefix}.idx", store) is None:
        yield from _check_pair(text, vocab_size, store)
        yield from _check_pair(role, _ROLES, store)
        yield from _check_same_lengths(text, role, store)
    else:
        yield from _check_pair(prefix, vocab_size, store)


def _check_pair(prefix: str, vocab_size: int | None, store: ObjectStore) -> Iterator[Finding]:
    if not is_remote(prefix):
        for path in sorted(Path(prefix).parent.glob(f"{Path(prefix).name}.*.tmp")):
            yield Finding(f"{path}: left by a program that was interrupted; it can be removed", is_fault=False)
    bin_, idx = (find_file(f"{prefix}{suffix}", store) for suffix in (".bin", ".idx"))
    for suffix, file in ((".bin", bin_), (".idx", idx)):
        if file is None:
            yield Finding(f"{prefix}{suffix}: is missing")
    if bin_ is None or idx is None:
        return
    index = idx.mapped()
    if index[: len(MAGIC)].tobytes() == MAGIC:
        faults = list(_check_current(idx.name, index, bin_))
    else:
        faults = list(_check_by_opening(prefix, index, store))
    yield from faults
    if vocab_size is not None and not any(finding.is_fault for finding in faults):
        yield from _check_tokens(IndexedDataset(prefix, store), vocab_size)


def _check_by_opening(prefix: str, index: np.ndarray, store: ObjectStore) -> Iterator[Finding]:
    """The format of fairseq's time, and what is no index at all."""
    try:
        IndexedDataset(prefix, store)
    except DataError as error:
        yield Finding(str(error))
        return
    if index[: len(LEGACY_MAGIC)].tobytes() == LEGACY_MAGIC:
        yield Finding(f"{prefix}.idx: an index of the old kind (TNTIDX), which is read as well", is_fault=False)


def _check_current(idx_path: str, raw: np.ndarray, bin_: DataFile) -> Iterator[Finding]:
    if raw.size < HEADER.size:
        yield Finding(f"{idx_path}: ends at byte {raw.size}, inside the header of {HEADER.size} bytes")
        return
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(raw[: HEADER.size].tobytes())
    if version != 1:
        yield Finding(f"{idx_path}: byte 9 holds version {version}; 1 is the only one there is")
    if code not in DTYPE_CODES.values():
        yield Finding(f"{idx_path}: byte 17 holds dtype code {code}; known are {sorted(DTYPE_CODES.values())}")
    lengths_end = HEADER.size + 4 * num_sequences
    pointers_end, end = lengths_end + 8 * num_sequences, lengths_end + 8 * (num_sequences + num_boundaries)
    if raw.size < end:
        yield Finding(
            f"{idx_path}: ends at byte {raw.size}; {num_sequences} sequences and {num_boundaries} document boundaries "
            f"take {end}"
        )
        return
    if raw.size not in (end, end + num_sequences):
        yield Finding(f"{idx_path}: {raw.size - end} bytes too many from byte {end} on")
    lengths, pointers = raw[HEADER.size : lengths_end].view("<i4"), raw[lengths_end:pointers_end].view("<i8")
    yield from _check_documents(idx_path, raw[pointers_end:end].view("<i8"), num_sequences)
    if code in DTYPE_CODES.values():
        yield from _check_sequences(idx_path, lengths, pointers, bin_, code)


def _check_sequences(
    idx_path: str, lengths: np.ndarray, pointers: np.ndarray, bin_: DataFile, code: int
) -> Iterator[Finding]:
    bin_bytes, num_tokens = bin_.num_bytes, int(lengths.clip(0).sum(dtype=np.int64))
    itemsize = np.dtype(next(name for name, known in DTYPE_CODES.items() if known == code)).itemsize
    if code == DTYPE_CODES["float32"] and bin_bytes == 8 * num_tokens:
        itemsize = 8  # Megatron-LLM's code 7
    negative, misplaced, beyond = _Named("has length"), _Named("starts at byte"), _Named("ends at byte")
    num_empty, position = 0, 0
    for start in range(0, len(lengths), CHUNK_SEQUENCES):
        part, at = lengths[start : start + CHUNK_SEQUENCES], pointers[start : start + CHUNK_SEQUENCES]
        ends = position + np.cumsum(part.clip(0), dtype=np.int64) * itemsize
        starts = np.concatenate(([position], ends[:-1]))
        negative.add(start, part < 0, part)
        misplaced.add(start, at != starts, at, partial(_expected, starts))
        beyond.add(start, ends > bin_bytes, ends, lambda _: f", beyond the {bin_bytes} of {file_name(bin_.name)}")
        num_empty += int(np.count_nonzero(part == 0))
        position = int(ends[-1])
    for named in (negative, misplaced, beyond):
        yield from named.findings(f"{idx_path}: sequence")
    if bin_bytes > position:
        yield Finding(f"{bin_.name}: {bin_bytes - position} bytes from byte {position} on belong to no sequence")
    if num_empty:
        yield Finding(f"{idx_path}: {num_empty} sequences are empty", is_fault=False)


def _check_documents(idx_path: str, boundaries: np.ndarray, num_sequences: int) -> Iterator[Finding]:
    if len(boundaries) == 0:
        yield Finding(f"{idx_path}: the document index is empty; it has to begin with 0")
        return
    if boundaries[0] != 0:
        yield Finding(f"{idx_path}: the document index begins with {boundaries[0]}, not 0")
    if len(boundaries) == 1:
        if num_sequences:
            yield Finding(f"{idx_path}: no documents, as in instruction data: each sequence is one", is_fault=False)
        return
    if boundaries[-1] != num_sequences:
        yield Finding(f"{idx_path}: the document index ends with {boundaries[-1]} of {num_sequences} sequences")
    backwards = _Named("begins at sequence")
    backwards.add(0, np.diff(boundaries) < 0, boundaries, lambda i: f" and ends before it, at {boundaries[i + 1]}")
    yield from backwards.findings(f"{idx_path}: document")


def _check_tokens(indexed: IndexedDataset, vocab_size: int) -> Iterator[Finding]:
    """Reads all of it."""
    if indexed.dtype.kind not in "iu":
        yield Finding(f"{indexed.prefix}: {indexed.dtype.name} values, which are no token ids", is_fault=False)
        return
    starts = indexed.sequence_lengths.astype(np.int64).cumsum() - indexed.sequence_lengths
    wrong = _Named("is")

    def place(first: int, i: int) -> str:
        position = first + i
        sequence = int(np.searchsorted(starts, position, side="right")) - 1
        return f" (sequence {sequence}, offset {position - int(starts[sequence])}), outside 0 to {vocab_size - 1}"

    for start in range(0, indexed.num_tokens, _TOKENS_AT_ONCE):
        tokens = indexed.tokens[start : start + _TOKENS_AT_ONCE].astype(np.int64)
        wrong.add(start, (tokens < 0) | (tokens >= vocab_size), tokens, partial(place, start))
    yield from wrong.findings(f"{indexed.prefix}.bin: token")


def _check_same_lengths(text: str, role: str, store: ObjectStore) -> Iterator[Finding]:
    try:
        texts, roles = IndexedDataset(text, store), IndexedDataset(role, store)
    except DataError:
        return  # said already
    if len(texts) != len(roles):
        yield Finding(f"{text} has {len(texts)} sequences and {role} {len(roles)}; they are of one conversation each")
        return
    differing = _Named("has")
    differing.add(
        0,
        texts.sequence_lengths != roles.sequence_lengths,
        texts.sequence_lengths,
        lambda i: f" tokens and {roles.sequence_lengths[i]} roles",
    )
    yield from differing.findings(f"{text}: sequence")


def _expected(starts: np.ndarray, i: int) -> str:
    return f", where byte {starts[i]} was expected"


def _nothing(_: int) -> str:
    return ""


class _Named:
    """Faults of one kind: the first ones by number, value and what else there is to say, all of them counted."""

    def __init__(self, verb: str):
        self.verb, self.count = verb, 0
        self.named: list[str] = []

    def add(self, first: int, is_wrong: np.ndarray, values: np.ndarray, more: Callable[[int], str] = _nothing) -> None:
        wrong = np.flatnonzero(is_wrong)
        self.count += len(wrong)
        for i in wrong[: _MAX_NAMED - len(self.named)].tolist():
            self.named.append(f"{first + i} {self.verb} {values[i]}{more(i)}")

    def findings(self, what: str) -> Iterator[Finding]:
        for text in self.named:
            yield Finding(f"{what} {text}")
        if self.count > len(self.named):
            yield Finding(f"{what}: {self.count - len(self.named)} more like the last")
