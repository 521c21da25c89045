"""Pretraining samples: windows of fixed length over documents put end to end."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data.gpt_index import build_indices, plan_epochs
from megatron.data.index_cache import cached_arrays
from megatron.data.indexed import IndexedDataset
from megatron.errors import DataError

# Part of every cache key: raise it when the meaning of the stored indices changes.
_INDEX_CODE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """tokens: int64 [s + 1], inputs are [:-1] and labels [1:]. loss_mask: float32 [s], 1 where the label counts."""

    tokens: np.ndarray
    loss_mask: np.ndarray


class GPTDataset:
    """Samples of `sequence_length` + 1 tokens from the documents of one range, in Megatron-LM's order.

    With `num_samples` the documents are read as many whole epochs as that takes, and ``len()`` may be more;
    without, exactly once. ``drop_last_partial=False`` serves the tokens after the last whole sample as one more
    sample, padded at its end with zeros under loss mask 0.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        document_range: range,
        num_samples: int | None,
        sequence_length: int,
        seed: int,
        *,
        drop_last_partial: bool = True,
        cache_path: Path | None = None,
    ):
        self.sequence_length = sequence_length
        self._indexed = indexed
        _check_request(indexed, document_range, num_samples, sequence_length)
        lengths = indexed.sequence_lengths[document_range.start : document_range.stop]
        self._tokens_per_epoch = int(lengths.sum(dtype=np.int64))
        self._check_tokens(document_range, num_samples)
        self._plan = plan_epochs(self._tokens_per_epoch, sequence_length, num_samples)
        # The plan stands for the number of samples: runs that differ only in that share their indices.
        self._key: dict[str, str | int | bool] = {
            "version": _INDEX_CODE_VERSION,
            "data": indexed.fingerprint,
            "documents": f"{document_range.start}:{document_range.stop}",
            "sequence_length": sequence_length,
            "seed": seed,
            "num_epochs": self._plan.num_epochs,
            "separate_final_epoch": self._plan.separate_final_epoch,
            "drop_last_partial": drop_last_partial,
        }
        arrays = cached_arrays(
            cache_path if cache_path is not None else indexed.prefix.parent / "cache",
            "gpt",
            self._key,
            lambda: build_indices(
                indexed.sequence_lengths,
                document_range,
                self._plan,
                tokens_per_epoch=self._tokens_per_epoch,
                sequence_length=sequence_length,
                seed=seed,
                drop_last_partial=drop_last_partial,
            ),
        )
        self.document_index = arrays["document_index"]
        self.sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)}")
        tokens = np.zeros(self.sequence_length + 1, dtype=np.int64)
        filled = 0
        for piece in self._pieces(int(self.shuffle_index[index])):
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
        loss_mask = np.ones(self.sequence_length, dtype=np.float32)
        loss_mask[filled - 1 :] = 0.0
        return Sample(tokens, loss_mask)

    @property
    def fingerprint(self) -> str:
        """Identifies the data and its order: a run that resumes on another one continues a different sequence."""
        return " ".join(f"{name}={value}" for name, value in self._key.items())

    def has_same_order_for(self, num_samples: int | None) -> bool:
        """Whether this dataset, built for `num_samples` instead, would serve the same samples in the same order."""
        return plan_epochs(self._tokens_per_epoch, self.sequence_length, num_samples) == self._plan

    def _pieces(self, sample: int) -> Iterator[np.ndarray]:
        """Yield the parts of documents that make up one sample, each a view [length]."""
        first, offset = (int(value) for value in self.sample_index[sample])
        last, last_offset = (int(value) for value in self.sample_index[sample + 1])
        for position in range(first, last):
            yield self._indexed.get(int(self.document_index[position]), offset)
            offset = 0
        # The boundary token belongs to both neighbours.
        yield self._indexed.get(int(self.document_index[last]), offset, last_offset + 1 - offset)

    def _check_tokens(self, document_range: range, num_samples: int | None) -> None:
        what = f"{self._indexed.prefix}: documents {document_range.start} to {document_range.stop} hold"
        if self._tokens_per_epoch == 0:
            raise DataError(f"{what} 0 tokens, which is no sample; choose other data or another --split.")
        if num_samples is None and self._tokens_per_epoch <= self.sequence_length:
            raise DataError(
                f"{what} {self._tokens_per_epoch} tokens, less than one sample of sequence length "
                f"{self.sequence_length} plus one label; use a shorter --seq_length, more data or another --split."
            )


def _check_request(
    indexed: IndexedDataset, document_range: range, num_samples: int | None, sequence_length: int
) -> None:
    if indexed.dtype.kind not in "iu":
        raise DataError(
            f"{indexed.prefix}: holds {indexed.dtype.name} values, which are not token ids; choose the dataset that "
            f"tools/preprocess_data.py wrote."
        )
    if sequence_length < 1:
        raise DataError(f"sequence length {sequence_length} is not a length; use --seq_length 1 or more.")
    if num_samples is not None and num_samples < 1:
        raise DataError(f"{num_samples} samples were asked for; ask for at least one, or for none of this split.")
    if len(document_range) == 0:
        raise DataError(
            f"{indexed.prefix}: no documents in {document_range.start} to {document_range.stop} of {len(indexed)}; "
            f"choose other data or another --split."
        )
    if document_range.step != 1 or document_range.start < 0 or document_range.stop > len(indexed):
        raise DataError(
            f"{indexed.prefix}: {document_range} is not a range of its {len(indexed)} documents; "
            f"give a range inside 0 to {len(indexed)}."
        )
