"""The order of GPT samples, exactly Megatron-LM's: which documents, cut where, shuffled how.

Documents are read one after the other as one stream of tokens, in shuffled order and as many epochs as the
samples need. Sample k is tokens k * s to (k + 1) * s of that stream, s inputs and s labels, so neighbours
share one token; a second shuffle decides which sample is served when. "Document" is Megatron-LM's word for
what the .idx file calls a sequence.
"""

from dataclasses import dataclass

import numpy as np

from megatron.data import helpers
from megatron.data.index_cache import Arrays
from megatron.errors import DataError

# A last epoch that gives less than this share of its samples is shuffled on its own: mixed with the whole epochs
# before it, its documents would come early and often.
_SEPARATE_BELOW = 0.80


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


def build_indices(
    sequence_lengths: np.ndarray,
    documents: range,
    plan: EpochPlan,
    *,
    tokens_per_epoch: int,
    sequence_length: int,
    seed: int,
    drop_last_partial: bool,
) -> Arrays:
    """Return document_index int32 [m], sample_index int32 or int64 [n + 1, 2] and shuffle_index uint32 or int64 [n].

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
    num_samples = len(sample_index) - 1
    num_first = plan.num_samples_sans_final_epoch if plan.separate_final_epoch else num_samples
    return {
        "document_index": document_index,
        "sample_index": sample_index,
        "shuffle_index": _shuffle_index(num_first, num_samples, random),
    }


def _document_index(documents: range, plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    """Return every document `num_epochs` times, int32: shuffled over all epochs, or the last one apart."""
    num_mixed = plan.num_epochs - 1 if plan.separate_final_epoch else plan.num_epochs
    epochs = np.empty((plan.num_epochs, len(documents)), dtype=np.int32)
    epochs[:] = np.arange(documents.start, documents.stop, dtype=np.int32)
    index = epochs.reshape(-1)
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
