"""The .idx file: which bytes of the .bin file are which sequence, and which sequences are which document.

Layout, all little-endian: 9 bytes ``MMIDIDX\\0\\0``; u64 version (1); u8 dtype code; u64 number of
sequences n; u64 number of document boundaries d; int32 lengths [n] in tokens; int64 pointers [n] in
bytes; int64 document boundaries [d] in sequences, starting at 0. Multimodal files append int8 modes
[n], which are ignored. Megatron-LLM's older layout, ``TNTIDX``, counts in elements and is read only.
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

import numpy as np

from megatron.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
LEGACY_HEADER = struct.Struct("<8s6Q")

# Megatron-LM's codes. Megatron-LLM wrote float64 under code 7; `_resolve_dtype` tells the two apart.
DTYPE_CODES: Mapping[str, int] = MappingProxyType(
    {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
)
_DTYPE_OF_CODE: Mapping[int, np.dtype] = MappingProxyType(
    {code: np.dtype(name).newbyteorder("<") for name, code in DTYPE_CODES.items()}
)

# Sequences checked or written at once: bounds the temporary arrays to a few MB whatever the corpus.
CHUNK_SEQUENCES = 1 << 18

PREPROCESS_AGAIN = "copy both files again from their source or repeat the preprocessing"


@dataclass(frozen=True)
class Index:
    """A validated index. n sequences, d document boundaries.

    sequence_lengths: int32 [n], in tokens. sequence_pointers: int64 [n], in bytes.
    document_indices: int64 [d], in sequences. The arrays may be unaligned views of the mapped file.
    """

    dtype: np.dtype
    num_tokens: int
    sequence_lengths: np.ndarray
    sequence_pointers: np.ndarray
    document_indices: np.ndarray


def map_file(path: Path) -> np.ndarray:
    """Return the file's bytes, uint8 [size], mapped read-only; the map lives as long as any view of it."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # a file without bytes cannot be mapped
            return np.empty(0, dtype=np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def read_index(raw: np.ndarray, idx_path: str, bin_path: str, bin_bytes: int) -> Index:
    """Check the bytes of an index, uint8 [n], against the size of its .bin file.

    `DataError` names file, position and remedy.
    """
    _require_bytes(idx_path, raw, len(MAGIC), "the first bytes, which name the format,")
    magic = raw[: len(MAGIC)].tobytes()
    if magic == MAGIC:
        index = _read_current(idx_path, raw, bin_path, bin_bytes)
    elif magic.startswith(LEGACY_MAGIC):
        index = _read_legacy(idx_path, raw)
    else:
        raise DataError(
            f"{idx_path}: byte 0 is {magic[:8]!r}, not the start of an index ({MAGIC!r} or {LEGACY_MAGIC!r}); "
            f"check that this is the .idx file of a tokenized dataset, or {PREPROCESS_AGAIN}."
        )
    _check_document_indices(idx_path, index)
    end_bytes = _check_sequences(idx_path, index)
    _check_bin_size(idx_path, bin_path, bin_bytes, end_bytes)
    return index


def announced_sequences(header: bytes) -> int | None:
    """The number of sequences that a current header announces; None for what is none."""
    if len(header) != HEADER.size or not header.startswith(MAGIC):
        return None
    return int(HEADER.unpack(header)[3])


def file_name(path: str) -> str:
    """Of a path or an address."""
    return path.rsplit("/", 1)[-1]


def write_index(
    idx: IO[bytes],
    dtype: np.dtype,
    lengths: Callable[[], Iterator[np.ndarray]],
    boundaries: Iterable[np.ndarray],
    num_sequences: int,
    num_boundaries: int,
) -> None:
    """Write an index from chunks of lengths, int32, which are gone through twice, and of boundaries, int64."""
    idx.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype.name], num_sequences, num_boundaries))
    for chunk in lengths():
        idx.write(chunk.astype("<i4", copy=False).data)
    position_bytes = 0
    for chunk in lengths():
        ends = position_bytes + np.cumsum(chunk.astype("<i8") * dtype.itemsize)
        idx.write(np.concatenate(([position_bytes], ends[:-1])).astype("<i8", copy=False).data)
        position_bytes = int(ends[-1])
    for chunk in boundaries:
        idx.write(chunk.astype("<i8", copy=False).data)


def _read_current(idx_path: str, raw: np.ndarray, bin_path: str, bin_bytes: int) -> Index:
    _require_bytes(idx_path, raw, HEADER.size, "the header")
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(raw[: HEADER.size].tobytes())
    _check_version(idx_path, version)
    lengths_end = HEADER.size + 4 * num_sequences
    pointers_end = lengths_end + 8 * num_sequences
    expected_bytes = pointers_end + 8 * num_boundaries
    counts = f"{num_sequences} sequences and {num_boundaries} document boundaries"
    _require_bytes(idx_path, raw, expected_bytes, counts)
    if raw.size not in (expected_bytes, expected_bytes + num_sequences):  # the latter with int8 modes
        raise DataError(
            f"{idx_path}: {raw.size} bytes, but its header announces {counts}, which take {expected_bytes}; "
            f"the file is damaged from byte {expected_bytes} on: {PREPROCESS_AGAIN}."
        )
    lengths = raw[HEADER.size : lengths_end].view("<i4")
    num_tokens = int(lengths.sum(dtype=np.int64))
    return Index(
        dtype=_resolve_dtype(idx_path, code, num_tokens, bin_path, bin_bytes),
        num_tokens=num_tokens,
        sequence_lengths=lengths,
        sequence_pointers=raw[lengths_end:pointers_end].view("<i8"),
        document_indices=raw[pointers_end:expected_bytes].view("<i8"),
    )


def _read_legacy(idx_path: str, raw: np.ndarray) -> Index:
    """Read ``TNTIDX``: one-dimensional sequences, with n + 1 offsets counted in elements."""
    _require_bytes(idx_path, raw, LEGACY_HEADER.size, "the header")
    _, version, code, itemsize, num_sequences, num_sizes, num_boundaries = LEGACY_HEADER.unpack(
        raw[: LEGACY_HEADER.size].tobytes()
    )
    _check_version(idx_path, version)
    counts = (num_sequences + 1, num_sequences + 1, num_sizes, num_boundaries)
    expected_bytes = LEGACY_HEADER.size + 8 * sum(counts)
    _require_bytes(idx_path, raw, expected_bytes, f"{num_sequences} sequences and {num_boundaries} document boundaries")
    _check_dtype_code(idx_path, code)
    # The element size is part of the header, which also settles what code 7 means.
    dtype = _DTYPE_OF_CODE[6] if (code, itemsize) == (7, 8) else _DTYPE_OF_CODE[code]
    if dtype.itemsize != itemsize or num_sizes != num_sequences:
        raise DataError(
            f"{idx_path}: the header at byte 8 pairs dtype code {code} with {itemsize} bytes an element and "
            f"{num_sequences} sequences with {num_sizes} sizes; only one-dimensional sequences of one dtype are "
            f"token data: {PREPROCESS_AGAIN}."
        )
    body = raw[LEGACY_HEADER.size : expected_bytes].view("<i8")
    _, offsets, lengths, boundaries = np.split(body, np.cumsum(counts)[:-1])
    if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
        raise DataError(
            f"{idx_path}: sequence {int(lengths.argmax())} has {int(lengths.max())} tokens, more than an index "
            f"can hold ({np.iinfo(np.int32).max}): {PREPROCESS_AGAIN}."
        )
    return Index(
        dtype=dtype,
        num_tokens=int(lengths.sum()),
        sequence_lengths=lengths.astype("<i4"),
        sequence_pointers=offsets[:-1] * itemsize,
        document_indices=boundaries,
    )


def _require_bytes(idx_path: str, raw: np.ndarray, needed: int, what: str) -> None:
    if raw.size < needed:
        raise DataError(
            f"{idx_path}: ends at byte {raw.size}, but {what} need {needed} bytes; the file is truncated: "
            f"{PREPROCESS_AGAIN}."
        )


def _check_version(idx_path: str, version: int) -> None:
    if version != VERSION:
        raise DataError(
            f"{idx_path}: index version {version}, only version {VERSION} is known; the file is damaged or was written "
            f"by a newer program: {PREPROCESS_AGAIN}."
        )


def _check_dtype_code(idx_path: str, code: int) -> None:
    if code not in _DTYPE_OF_CODE:
        known = ", ".join(f"{known_code} {name}" for name, known_code in DTYPE_CODES.items())
        raise DataError(f"{idx_path}: unknown dtype code {code} (known: {known}): {PREPROCESS_AGAIN}.")


def _resolve_dtype(idx_path: str, code: int, num_tokens: int, bin_path: str, bin_bytes: int) -> np.dtype:
    """Code 7 is float32 in Megatron-LM and float64 in Megatron-LLM: the size of the .bin file decides."""
    _check_dtype_code(idx_path, code)
    if code != DTYPE_CODES["float32"] or bin_bytes == 4 * num_tokens:
        return _DTYPE_OF_CODE[code]
    if bin_bytes == 8 * num_tokens:
        return _DTYPE_OF_CODE[DTYPE_CODES["float64"]]
    raise DataError(
        f"{bin_path}: {bin_bytes} bytes, but {num_tokens} values under dtype code 7 take {4 * num_tokens} (float32) or "
        f"{8 * num_tokens} (float64); the file does not belong to {file_name(idx_path)}: {PREPROCESS_AGAIN}."
    )


def _chunks(num_sequences: int) -> Iterator[slice]:
    for start in range(0, num_sequences, CHUNK_SEQUENCES):
        yield slice(start, min(start + CHUNK_SEQUENCES, num_sequences))


def _check_sequences(idx_path: str, index: Index) -> int:
    """Check that every sequence starts where the previous one ends; return where the last one ends, in bytes."""
    position_bytes = 0
    for chunk in _chunks(len(index.sequence_lengths)):
        lengths = index.sequence_lengths[chunk]
        ends = position_bytes + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        starts = np.concatenate(([position_bytes], ends[:-1]))
        wrong = np.flatnonzero((lengths < 0) | (index.sequence_pointers[chunk] != starts))
        if wrong.size:
            first = int(wrong[0])
            raise DataError(
                f"{idx_path}: sequence {chunk.start + first} has length {int(lengths[first])} and starts at byte "
                f"{int(index.sequence_pointers[chunk][first])}, where the sequences before it end at byte "
                f"{int(starts[first])}; lengths and pointers contradict each other: {PREPROCESS_AGAIN}."
            )
        position_bytes = int(ends[-1])
    return position_bytes


def _check_bin_size(idx_path: str, bin_path: str, bin_bytes: int, end_bytes: int) -> None:
    if bin_bytes < end_bytes:
        raise DataError(
            f"{bin_path}: {bin_bytes} bytes, but {file_name(idx_path)} describes {end_bytes}; the file is truncated "
            f"at byte {bin_bytes}: {PREPROCESS_AGAIN}."
        )
    if bin_bytes > end_bytes:
        # Most likely the .idx file of another run: using it would cut the text in the wrong places, silently.
        raise DataError(
            f"{bin_path}: {bin_bytes} bytes, but {file_name(idx_path)} describes only {end_bytes}; the two files do "
            f"not belong together: {PREPROCESS_AGAIN} (if the rest is a known leftover, "
            f"`truncate -s {end_bytes} {bin_path}` removes it)."
        )


def _check_document_indices(idx_path: str, index: Index) -> None:
    boundaries, num_sequences = index.document_indices, len(index.sequence_lengths)
    if len(boundaries) == 1 and boundaries[0] == 0:  # instruction data, and data without a document
        return
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != num_sequences:
        ends = f"runs from {int(boundaries[0])} to {int(boundaries[-1])}" if len(boundaries) else "is empty"
        raise DataError(
            f"{idx_path}: the document index {ends}, but has to run from 0 to {num_sequences}, the number of "
            f"sequences: {PREPROCESS_AGAIN}."
        )
    for chunk in _chunks(len(boundaries) - 1):
        backwards = np.flatnonzero(np.diff(boundaries[chunk.start : chunk.stop + 1]) < 0)
        if backwards.size:
            document = chunk.start + int(backwards[0])
            raise DataError(
                f"{idx_path}: document {document} starts at sequence {int(boundaries[document])} and ends before it, "
                f"at sequence {int(boundaries[document + 1])}: {PREPROCESS_AGAIN}."
            )
