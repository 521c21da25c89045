"""Tokenized text on disk: ``<prefix>.bin`` holds the ids, ``<prefix>.idx`` says where each sequence lies.

A *sequence* is a stored run of tokens, a *document* one or more sequences; most files have one sequence
per document. The files are byte for byte those of Megatron-LM and Megatron-LLM (see `index_file`).
"""

import hashlib
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron.data import helpers
from megatron.data.data_file import RemoteTokens, require_files
from megatron.data.index_file import CHUNK_SEQUENCES, read_index
from megatron.data.object_store import ObjectStore, is_remote
from megatron.errors import DataError

# Blocks of the .bin file that enter a fingerprint, evenly spaced, first and last included.
_FINGERPRINT_BLOCKS = 64
_FINGERPRINT_BLOCK_BYTES = 4096


def best_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron-LM picks: uint16 while the ids, with some room, fit into it."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def name_of(path: str | os.PathLike[str]) -> str:
    """``corpus``, ``corpus.bin`` and ``corpus.idx`` all name the dataset with the prefix ``corpus``."""
    text = os.fspath(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def strip_suffix(path: str | os.PathLike[str]) -> Path:
    """`name_of` a dataset on a disk."""
    return Path(name_of(path))


def default_cache_path(path: str | os.PathLike[str]) -> Path:
    """Where what is made from a dataset or a text file is kept: beside it, or in the home directory if it is far."""
    return ObjectStore().cache_path if is_remote(path) else Path(path).parent / "cache"


class IndexedDataset:
    """Random access to the sequences of a tokenized dataset, checked when opened.

    On a disk both files are mapped. In an object store (``s3://bucket/corpus``) the index is copied once into the
    cache of `store`, and tokens are read when they are asked for.
    """

    def __init__(self, prefix: str | os.PathLike[str], store: ObjectStore | None = None):
        self.prefix = name_of(prefix)
        idx, bin_ = require_files(self.prefix, store or ObjectStore())
        try:
            self._index = read_index(idx.mapped(), idx.name, bin_.name, bin_.num_bytes)
            self._tokens = bin_.tokens(self._index.dtype)
        except OSError as error:
            raise DataError(
                f"{error.filename or self.prefix}: cannot be read ({error.strerror}); check its permissions."
            ) from error

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self._index.sequence_lengths)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return tokens [length] of one sequence, from `offset` on: a read-only view that outlives the dataset."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {self.prefix}, which has {len(self)}")
        available = int(self._index.sequence_lengths[index])
        stop = available if length is None else offset + length
        if not 0 <= offset <= stop <= available:
            raise IndexError(f"tokens {offset}:{stop} of sequence {index} of {self.prefix}, which has {available}")
        start = int(self._index.sequence_pointers[index]) // self.dtype.itemsize
        return self._tokens[start + offset : start + stop]

    def read_span(self, sequences: np.ndarray, offset: int, stop: int, size: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Return tokens int64 [size] from `offset` of the first sequence to before `stop` of the last, end to end.

        Also returned are how many are filled (the others are 0), and int32 [k] where sequences begin among them.
        sequences: int32 [m].
        """
        if isinstance(self._tokens, RemoteTokens):
            return self._read_remote_span(self._tokens, sequences, offset, stop, size)
        return helpers.read_span(
            self._tokens, self._index.sequence_pointers, self.sequence_lengths, sequences, offset, stop, size
        )

    def _read_remote_span(
        self, tokens: RemoteTokens, sequences: np.ndarray, offset: int, stop: int, size: int
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """Fetches the parts of the span side by side, and reads on as from a file that holds nothing else."""
        firsts = self._index.sequence_pointers[sequences] // self.dtype.itemsize
        ends = firsts + self.sequence_lengths[sequences]
        ends[-1] = firsts[-1] + stop
        firsts[0] += offset
        parts = tokens.read(list(zip(firsts.tolist(), ends.tolist(), strict=True)))
        lengths = (ends - firsts).astype(np.int32)
        pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize
        order = np.arange(len(parts), dtype=np.int32)
        return helpers.read_span(np.concatenate(parts), pointers, lengths, order, 0, int(lengths[-1]), size)

    @property
    def dtype(self) -> np.dtype:
        return self._index.dtype

    @property
    def num_tokens(self) -> int:
        return self._index.num_tokens

    @property
    def is_remote(self) -> bool:
        return isinstance(self._tokens, RemoteTokens)

    @property
    def tokens(self) -> np.ndarray | RemoteTokens:
        """All sequences end to end, [num_tokens], to be cut: a read-only view of the mapped .bin file if it is here."""
        return self._tokens

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int32 [len(self)], in tokens; perhaps an unaligned view of the mapped file."""
        return self._index.sequence_lengths

    @property
    def document_indices(self) -> np.ndarray:
        """int64 [d], as stored: document i is the sequences d[i] to d[i + 1]; only [0] in instruction data."""
        return self._index.document_indices

    @property
    def num_documents(self) -> int:
        """Documents as stored; where the document index is only [0], each sequence is a document."""
        return len(self) if len(self.document_indices) == 1 else len(self.document_indices) - 1

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: dtype, all sequence lengths, and blocks of tokens sampled over the whole .bin file.

        The lengths decide the sample order and are hashed in full. The path is left out: a copy is the same data.
        """
        digest = hashlib.sha256(f"{self.dtype.name} {len(self)} {self.num_tokens}".encode())
        for start in range(0, len(self), CHUNK_SEQUENCES):
            digest.update(self.sequence_lengths[start : start + CHUNK_SEQUENCES].tobytes())
        block = _FINGERPRINT_BLOCK_BYTES // self.dtype.itemsize
        last_start = max(self.num_tokens - block, 0)
        for start in np.unique(np.linspace(0, last_start, _FINGERPRINT_BLOCKS).astype(np.int64)).tolist():
            digest.update(self._tokens[start : start + block].tobytes())
        return digest.hexdigest()
