"""Writes tokenized text sequence by sequence: both files appear at once, complete, or not at all."""

import contextlib
import errno
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from megatron.data.index_file import CHUNK_SEQUENCES, DTYPE_CODES, write_index
from megatron.data.indexed import IndexedDataset, strip_suffix
from megatron.data.object_store import is_remote
from megatron.durable import sync_file, sync_folder
from megatron.errors import ConfigError, DataError

_WRITE_BUFFER_BYTES = 1 << 20
_COPY_BYTES = 1 << 26
_COPY_TOKENS = 1 << 22
# What file systems answer between which, or at all, the kernel cannot copy.
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class IndexedDatasetWriter:
    """Write a dataset sequence by sequence; both files appear, complete, in `finalize()` and not before.

    Everything goes to temporary names first. Leaving the ``with`` block finalizes, an exception in it removes the
    temporary files. Memory: 4 bytes a sequence and 8 bytes a document.

    Without `has_documents` the document index is only [0], as in instruction data: every sequence stands for itself.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike, *, has_documents: bool = True):
        if is_remote(prefix):
            raise ConfigError(
                f"{prefix}: is in an object store, which is read only; write to a disk and copy the files."
            )
        self.prefix = strip_suffix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype.name not in DTYPE_CODES:
            raise DataError(
                f"dtype {self.dtype.name} has no code in the .idx format; use one of {', '.join(DTYPE_CODES)}."
            )
        # The process number keeps two jobs that write the same prefix from writing into one file.
        self._bin_tmp = Path(f"{self.prefix}.bin.{os.getpid()}.tmp")
        self._idx_tmp = Path(f"{self.prefix}.idx.{os.getpid()}.tmp")
        self._lengths = array("i")
        self._boundaries = array("q", [0])
        self._has_documents = has_documents
        self._closed = False
        self._background = ThreadPoolExecutor(1)
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(self._bin_tmp, "wb", buffering=_WRITE_BUFFER_BYTES)  # noqa: SIM115 - closed in finalize/abort
        except OSError as error:
            raise self._cannot_write(error) from error

    def add_item(self, tokens: npt.ArrayLike) -> None:
        """Append one sequence, tokens [length], to the document that `end_document` will end."""
        values = self._convert(tokens)
        if values.size > np.iinfo(np.int32).max:
            raise DataError(
                f"sequence {len(self._lengths)} has {values.size} tokens, more than an index can hold "
                f"({np.iinfo(np.int32).max}); split the document."
            )
        self._write(values)
        self._lengths.append(values.size)

    def end_document(self) -> None:
        self._boundaries.append(len(self._lengths))

    def add_document(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> None:
        """Append one document, tokens [sum(lengths)]; without `lengths` it is one sequence."""
        if lengths is None:
            self.add_item(tokens)
            return self.end_document()
        values = self._convert(tokens)
        counts = [int(length) for length in np.atleast_1d(np.asarray(lengths))]
        if sum(counts) != values.size or any(count < 0 for count in counts):
            raise DataError(
                f"document {len(self._boundaries) - 1} has {values.size} tokens, but its sequence lengths {counts} add "
                f"up to {sum(counts)}; lengths must not be negative and must add up to the number of tokens."
            )
        self._write(values)
        self._lengths.extend(counts)
        self.end_document()

    def add_dataset(self, indexed: IndexedDataset, on_bytes: Callable[[int], object] = lambda _: None) -> None:
        """Append all of another dataset of the same dtype, its documents included, at the speed of a copy.

        `on_bytes` hears of the bytes of tokens as they are copied.
        """
        if indexed.dtype != self.dtype:
            raise DataError(
                f"{indexed.prefix}: holds {indexed.dtype.name}, and {self.prefix} is written in {self.dtype.name}; "
                "tokenize all of the text with one tokenizer."
            )
        first = len(self._lengths)
        try:
            if indexed.is_remote:
                self._copy_tokens(indexed, on_bytes)
            else:
                self._bin.flush()
                with open(f"{indexed.prefix}.bin", "rb") as source:
                    _copy(source, self._bin, on_bytes)
                # It goes to the disk beside the next copy. What fails there fails in `finalize` too.
                self._background.submit(sync_file, self._bin_tmp)
        except OSError as error:
            self.abort()
            raise self._cannot_write(error) from error
        for start in range(0, len(indexed), CHUNK_SEQUENCES):
            self._lengths.frombytes(indexed.sequence_lengths[start : start + CHUNK_SEQUENCES].astype("i4").tobytes())
        self._boundaries.frombytes((indexed.document_indices[1:] + first).astype("i8").tobytes())

    def finalize(self) -> None:
        """Make both files durable and give them their final names; the .idx file comes last and completes the pair."""
        if self._has_documents and self._boundaries[-1] != len(self._lengths):
            raise DataError(
                f"{self.prefix}: the last {len(self._lengths) - self._boundaries[-1]} sequences belong to no document; "
                f"call end_document() before finalize()."
            )
        try:
            _sync_and_close(self._bin)
            self._background.shutdown()
            with open(self._idx_tmp, "wb", buffering=_WRITE_BUFFER_BYTES) as idx:
                self._write_index(idx)
                _sync_and_close(idx)
            # An earlier .idx must never stand beside the new .bin, not even between two renames.
            Path(f"{self.prefix}.idx").unlink(missing_ok=True)
            os.replace(self._bin_tmp, f"{self.prefix}.bin")
            os.replace(self._idx_tmp, f"{self.prefix}.idx")
            sync_folder(self.prefix.parent)
        except OSError as error:
            self.abort()
            raise self._cannot_write(error) from error
        self._closed = True

    def abort(self) -> None:
        """Remove the temporary files; what stood under the final names before is untouched."""
        self._closed = True
        self._background.shutdown()
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._bin.close()
        self._bin_tmp.unlink(missing_ok=True)
        self._idx_tmp.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._closed:
            return
        if kind is not None:
            return self.abort()
        try:
            self.finalize()
        except BaseException:
            self.abort()
            raise

    def _convert(self, tokens: npt.ArrayLike) -> np.ndarray:
        """Convert to the dtype of the file, refusing every value that it cannot hold."""
        values = np.asarray(tokens)
        if values.ndim != 1:
            raise DataError(f"tokens of shape {values.shape} are not one sequence; pass a one-dimensional array.")
        if values.dtype == self.dtype or values.size == 0:
            return values.astype(self.dtype, copy=False)
        if self.dtype.kind in "iu":
            self._check_range(values)
        return values.astype(self.dtype)

    def _check_range(self, values: np.ndarray) -> None:
        where = f"document {len(self._boundaries) - 1}"
        if values.dtype.kind not in "iu":
            raise DataError(f"{where}: tokens of dtype {values.dtype} cannot be ids in a file of {self.dtype.name}.")
        limits = np.iinfo(self.dtype)
        low, high = int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            raise DataError(
                f"{where}: token id {high if high > limits.max else low} does not fit into {self.dtype.name} "
                f"({limits.min} to {limits.max}); choose the dtype from the whole vocabulary, added tokens included."
            )

    def _write(self, values: np.ndarray) -> None:
        try:
            self._bin.write(values.tobytes())
        except OSError as error:
            self.abort()
            raise self._cannot_write(error) from error

    def _copy_tokens(self, indexed: IndexedDataset, on_bytes: Callable[[int], object]) -> None:
        for start in range(0, indexed.num_tokens, _COPY_TOKENS):
            tokens = indexed.tokens[start : start + _COPY_TOKENS]
            self._bin.write(tokens.data)
            on_bytes(tokens.nbytes)

    def _write_index(self, idx: IO[bytes]) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        boundaries = np.frombuffer(self._boundaries, dtype=np.int64)

        def chunks() -> Iterator[np.ndarray]:
            return (lengths[start : start + CHUNK_SEQUENCES] for start in range(0, len(lengths), CHUNK_SEQUENCES))

        write_index(idx, self.dtype, chunks, [boundaries], len(lengths), len(boundaries))

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(
            f"{self.prefix}: cannot be written ({error.strerror}); what stood under this name is untouched. "
            f"Choose a folder that exists, is writable and has space."
        )


def _copy(source: IO[bytes], target: IO[bytes], on_bytes: Callable[[int], object]) -> None:
    """Appends a file, inside the kernel where that can be done."""
    try:
        while copied := os.copy_file_range(source.fileno(), target.fileno(), _COPY_BYTES):
            on_bytes(copied)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        target.seek(0, os.SEEK_END)
        while chunk := source.read(_WRITE_BUFFER_BYTES):
            target.write(chunk)
            on_bytes(len(chunk))


def _sync_and_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
