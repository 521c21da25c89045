"""The C++ sample index equals a walk over the tokens in Python."""

import sys
import threading

import numpy as np
import pytest

from megatron.data.helpers import build_sample_index


def oracle(sizes: np.ndarray, documents: np.ndarray, sequence_length: int, drop_last_partial: bool) -> list[list[int]]:
    """Where every sample begins, from a list that names each token of the stream one by one."""
    tokens = [[place, offset] for place, document in enumerate(documents) for offset in range(sizes[document])]
    last = len(tokens) - 1
    boundaries = list(range(sequence_length, last + 1, sequence_length))
    if not drop_last_partial and last % sequence_length:
        boundaries.append(last)
    return [[0, 0], *(tokens[boundary] for boundary in boundaries)]


def random_corpus(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    num_documents = int(random.integers(1, 30))
    longest = int(random.choice([1, 3, 40]))
    sizes = random.integers(0, longest + 1, num_documents, dtype=np.int32)
    sizes[random.integers(num_documents)] = 1  # at least one token
    epochs = [random.permutation(num_documents) for _ in range(random.integers(1, 4))]
    return sizes, np.concatenate(epochs).astype(np.int32)


@pytest.mark.parametrize("drop_last_partial", [True, False])
@pytest.mark.parametrize("wide", [False, True])
def test_sample_index_equals_the_python_oracle_on_random_corpora(drop_last_partial: bool, wide: bool):
    random = np.random.default_rng(7)
    for _ in range(300):
        sizes, documents = random_corpus(random)
        sequence_length = int(random.integers(1, 20))
        index = build_sample_index(
            sizes,
            documents,
            sequence_length=sequence_length,
            num_tokens=int(sizes[documents].sum()),
            drop_last_partial=drop_last_partial,
            wide=wide,
        )
        assert index.dtype == (np.int64 if wide else np.int32)
        assert index.tolist() == oracle(sizes, documents, sequence_length, drop_last_partial)


def test_the_last_partial_sample_survives_beyond_float32_precision():
    """2**24 + 2 tokens at s = 1 make 2**24 + 1 samples, a number that float32 rounds to 2**24.

    At s = 2 the last sample is partial: 2**23 full ones and one of a single label.
    """
    sizes = np.array([2**24 + 2], dtype=np.int32)
    documents = np.zeros(1, dtype=np.int32)
    for sequence_length, num_samples in ((1, 2**24 + 1), (2, 2**23 + 1)):
        index = build_sample_index(
            sizes, documents, sequence_length=sequence_length, num_tokens=2**24 + 2, drop_last_partial=False
        )
        assert len(index) - 1 == num_samples
        assert index[-1].tolist() == [0, 2**24 + 1]


def test_the_walk_runs_without_the_gil():
    """Threads are never preempted here, so another one can only run if the call releases the GIL."""
    sizes, documents = np.array([5], dtype=np.int32), np.zeros(1 << 20, dtype=np.int32)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        assert any(_another_thread_runs_during(sizes, documents) for _ in range(50))
    finally:
        sys.setswitchinterval(interval)


def _another_thread_runs_during(sizes: np.ndarray, documents: np.ndarray) -> bool:
    go, ran = threading.Event(), []

    def other() -> None:
        go.wait()
        ran.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    go.set()  # wakes the thread, which then needs the GIL
    ran_before = bool(ran)
    build_sample_index(sizes, documents, sequence_length=3, num_tokens=5 << 20)
    ran_during = bool(ran) and not ran_before
    thread.join()
    return ran_during


SIZES = np.array([3, 2], dtype=np.int32)
DOCUMENTS = np.array([1, 0], dtype=np.int32)


@pytest.mark.parametrize(
    ("sizes", "documents", "sequence_length", "num_tokens", "error", "reason"),
    [
        (SIZES, DOCUMENTS, 0, 5, ValueError, "sequence_length = 0 is not in"),
        (SIZES, DOCUMENTS, 2**31, 5, ValueError, "sequence_length = 2147483648 is not in"),
        (SIZES, DOCUMENTS, 2, 0, ValueError, "num_tokens = 0 must be at least 1"),
        (SIZES, DOCUMENTS, 2, 7, ValueError, "the documents hold 5 tokens, fewer than num_tokens = 7"),
        (SIZES, DOCUMENTS, 2, 2**62, ValueError, "is more than 2 documents can hold"),
        (SIZES, np.array([0, 2], dtype=np.int32), 2, 5, IndexError, r"document 2 at position 1 is not in \[0, 2\)"),
        (SIZES, np.array([-1, 0], dtype=np.int32), 2, 5, IndexError, r"document -1 at position 0 is not in \[0, 2\)"),
        (np.array([3, -2], dtype=np.int32), DOCUMENTS, 2, 1, IndexError, "size -2 at position 1 is not in"),
        (SIZES.reshape(1, 2), DOCUMENTS, 2, 5, ValueError, "sizes must have one dimension, not 2"),
        (SIZES.astype(np.int64), DOCUMENTS, 2, 5, ValueError, "sizes must be int32, not int64"),
        (SIZES[::-1], DOCUMENTS, 2, 5, ValueError, "sizes must be contiguous"),
    ],
)
def test_input_that_contradicts_itself_is_an_exception(
    sizes: np.ndarray,
    documents: np.ndarray,
    sequence_length: int,
    num_tokens: int,
    error: type[Exception],
    reason: str,
):
    with pytest.raises(error, match=reason):
        build_sample_index(sizes, documents, sequence_length=sequence_length, num_tokens=num_tokens)


def test_unaligned_arrays_are_read_where_they_lie():
    """The lengths in a mapped .idx file start at byte 34."""
    unaligned = np.frombuffer(b"\x00\x00" + SIZES.tobytes(), dtype=np.uint8)[2:].view(np.int32)
    if unaligned.flags.aligned:
        unaligned = np.frombuffer(b"\x00" + SIZES.tobytes(), dtype=np.uint8)[1:].view(np.int32)
    assert not unaligned.flags.aligned
    index = build_sample_index(unaligned, DOCUMENTS, sequence_length=2, num_tokens=5)
    assert index.tolist() == oracle(SIZES, DOCUMENTS, 2, drop_last_partial=True)
