"""Reading several sequences at once equals joining them one by one."""

import numpy as np
import pytest

from megatron.data.helpers import read_span
from megatron.data.index_file import DTYPE_CODES
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter


def written(prefix, dtype: str) -> tuple[IndexedDataset, list[np.ndarray]]:
    random = np.random.default_rng(1)
    top = np.iinfo(dtype).max
    sequences = [random.integers(0, min(top, 2**31), n, endpoint=True).astype(dtype) for n in (5, 0, 1, 9, 0, 3)]
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add_document(sequence)
    return IndexedDataset(prefix), sequences


@pytest.mark.parametrize("dtype", [name for name in DTYPE_CODES if np.dtype(name).kind in "iu"])
def test_a_span_equals_the_sequences_joined(dtype, tmp_path):
    indexed, sequences = written(tmp_path / "data", dtype)
    random = np.random.default_rng(2)
    for _ in range(200):
        chosen = random.integers(0, len(sequences), random.integers(1, 6)).astype(np.int32)
        offset = int(random.integers(0, len(sequences[chosen[0]]) + 1))
        first_stop = len(sequences[chosen[-1]])
        stop = int(random.integers(offset if len(chosen) == 1 else 0, first_stop + 1))
        pieces = [sequences[i] for i in chosen]
        pieces[-1] = pieces[-1][:stop]
        pieces[0] = pieces[0][offset:]
        joined = np.concatenate(pieces).astype(np.int64)
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = [end - len(piece) for end, piece in zip(ends, pieces, strict=True) if len(piece)]
        tokens, num_filled, begins = indexed.read_span(chosen, offset, stop, len(joined) + 2)
        assert tokens.tolist() == [*joined.tolist(), 0, 0] and num_filled == len(joined)
        assert begins.tolist() == starts


@pytest.mark.parametrize(
    ("sequences", "offset", "stop", "size", "reason"),
    [
        ([6], 0, 1, 10, "sequence 6 of 6"),
        ([-1], 0, 1, 10, "sequence -1 of 6"),
        ([0], 6, 5, 10, "tokens 6 to 5 of sequence 0"),
        ([0], 0, 6, 10, "tokens 0 to 6 of sequence 0"),
        ([0], -1, 5, 10, "tokens -1 to 5 of sequence 0"),
        ([0, 3], 0, 9, 13, "tokens 0 to 9 of sequence 3"),
    ],
)
def test_a_span_outside_the_data_is_an_index_error(sequences, offset, stop, size, reason, tmp_path):
    indexed, _ = written(tmp_path / "data", "uint16")
    with pytest.raises(IndexError, match=reason):
        indexed.read_span(np.array(sequences, dtype=np.int32), offset, stop, size)


def test_pointers_beyond_the_tokens_are_an_index_error():
    """Indices are checked when a file is opened; the walk does not rely on it."""
    tokens = np.arange(4, dtype=np.uint16)
    for pointer in (6, -2, 2**62):
        pointers, lengths = np.array([pointer]), np.array([3], dtype=np.int32)
        with pytest.raises(IndexError):
            read_span(tokens, pointers, lengths, np.zeros(1, dtype=np.int32), 0, 3, 3)
