"""The order of GPT samples, exactly Megatron-LM's: which documents, cut where, shuffled how.

Documents are read one after the other as one stream of tokens, in shuffled order and as many epochs as the
samples need. Sample k is tokens k * s to (k + 1) * s of that stream, s inputs and s labels, so neighbours
share one token; a second shuffle decides which sample is served when. "Document" is Megatron-LM's word for
what the .idx file calls a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron.data import helpers
from megatron.errors import DataError

# A last epoch that gives less than this share of its samples is shuffled on its own: mixed with the whole epochs
# before it, its documents would come early and often.
_SEPARATE_BELOW = 0.80
_COUNTED_AT_ONCE = 1 << 20

Emit = Callable[[str, np.ndarray], object]


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are read, and whether the last epoch is shuffled apart.

    For one dataset, seed and sequence length, equal plans mean the same samples in the same order, whatever
    the number of samples asked for.
    """

    num_epochs: int
    separate_final_epoch: bool
    num_samples_sans_final_epoch: int


def plan_epochs(tokens_per_epoch: int, sequence_length: int, num_samples: int | None) -> EpochPlan:
    """Plan for at least `num_samples` samples, or for exactly one epoch when it is None."""
    if tokens_per_epoch < 1:
        raise DataError("0 tokens in the documents, so that no number of epochs gives a sample; choose other data.")
    if num_samples is None:
        return EpochPlan(1, False, 0)
    tokens_needed = num_samples * sequence_length + 1
    num_epochs = max(1, -(-tokens_needed // tokens_per_epoch))
    if num_epochs == 1:
        return EpochPlan(1, False, 0)
    before_final = ((num_epochs - 1) * tokens_per_epoch - 1) // sequence_length
    samples_per_epoch = (tokens_per_epoch - 1) // sequence_length
    separate = num_samples - before_final < int(_SEPARATE_BELOW * samples_per_epoch)
    return EpochPlan(num_epochs, separate, before_final)


@dataclass(frozen=True)
class IndexSizes:
    """How long the indices of one plan are: m documents to read, n samples."""

    num_documents: int
    num_samples: int

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
        """Shape and dtype by name: document_index [m], sample_index [n + 1, 2] and shuffle_index [n]."""
        is_wide = self.num_documents > np.iinfo(np.int32).max
        is_long = self.num_samples >= np.iinfo(np.uint32).max - 1
        return {
            "document_index": ((self.num_documents,), np.int32),
            "sample_index": ((self.num_samples + 1, 2), np.int64 if is_wide else np.int32),
            "shuffle_index": ((self.num_samples,), np.int64 if is_long else np.uint32),
        }


def index_sizes(
    documents: range, plan: EpochPlan, *, tokens_per_epoch: int, sequence_length: int, drop_last_partial: bool
) -> IndexSizes:
    num_full, rest = divmod(plan.num_epochs * tokens_per_epoch - 1, sequence_length)
    return IndexSizes(plan.num_epochs * len(documents), num_full + (rest > 0 and not drop_last_partial))


def build_indices(
    emit: Emit,
    sequence_lengths: np.ndarray,
    documents: range,
    plan: EpochPlan,
    *,
    tokens_per_epoch: int,
    sequence_length: int,
    seed: int,
    drop_last_partial: bool,
) -> None:
    """Hands each array of `index_sizes` to `emit` by its name, and lets go of it as soon as may be.

    sequence_lengths: int32 [all documents of the file].
    """
    # The legacy generator, and one state for both shuffles: any other draw would be another order.
    random = np.random.RandomState(seed)
    document_index = _document_index(documents, plan, random)
    sample_index = helpers.build_sample_index(
        sequence_lengths,
        document_index,
        sequence_length=sequence_length,
        num_tokens=plan.num_epochs * tokens_per_epoch,
        drop_last_partial=drop_last_partial,
        wide=len(document_index) > np.iinfo(np.int32).max,
    )
    emit("document_index", document_index)
    del document_index
    num_samples = len(sample_index) - 1
    emit("sample_index", sample_index)
    del sample_index
    num_first = plan.num_samples_sans_final_epoch if plan.separate_final_epoch else num_samples
    emit("shuffle_index", _shuffle_index(num_first, num_samples, random))


def _document_index(documents: range, plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    """Return every document `num_epochs` times, int32: shuffled over all epochs, or the last one apart."""
    index = np.empty(plan.num_epochs * len(documents), dtype=np.int32)
    for epoch in index.reshape(plan.num_epochs, len(documents)):
        _count_from(documents.start, epoch)
    num_mixed = plan.num_epochs - 1 if plan.separate_final_epoch else plan.num_epochs
    random.shuffle(index[: num_mixed * len(documents)])
    if plan.separate_final_epoch:
        random.shuffle(index[num_mixed * len(documents) :])
    return index


def _shuffle_index(num_first: int, num_samples: int, random: np.random.RandomState) -> np.ndarray:
    """Return a permutation of the samples that keeps the first `num_first` of them first."""
    dtype = np.int64 if num_samples >= np.iinfo(np.uint32).max - 1 else np.uint32
    index = np.arange(num_samples, dtype=dtype)
    random.shuffle(index[:num_first])
    if num_first != num_samples:
        random.shuffle(index[num_first:])
    return index


def _count_from(first: int, out: np.ndarray) -> None:
    """Without a second array of this length."""
    for start in range(0, len(out), _COUNTED_AT_ONCE):
        part = out[start : start + _COUNTED_AT_ONCE]
        part[:] = np.arange(first + start, first + start + len(part), dtype=out.dtype)
