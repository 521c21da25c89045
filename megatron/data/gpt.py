"""Pretraining samples: windows of fixed length over documents put end to end."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron.data import helpers
from megatron.data.fim import FillInMiddle
from megatron.data.gpt_index import Emit, EpochPlan, IndexSizes, build_indices, index_sizes, plan_epochs
from megatron.data.index_cache import Arrays, cached_entry
from megatron.data.indexed import IndexedDataset, default_cache_path
from megatron.data.pieces import Piece
from megatron.data.sample import Sample
from megatron.errors import DataError

# Part of every cache key: raise it when the meaning of the stored indices changes.
INDEX_CODE_VERSION = 1


@dataclass(frozen=True)
class DocumentBounds:
    """What happens where one document ends inside a sample and the next begins.

    `eod` is the id of the token that ends documents; labels that follow it do not count where it is given.
    """

    reset_positions: bool = False
    reset_attention: bool = False
    eod: int | None = None


class GPTSamples:
    """Reads samples by their indices (see `gpt_index.build_indices`). The tokens are opened when the first is read."""

    def __init__(
        self,
        open_tokens: Callable[[], IndexedDataset],
        indices: Arrays,
        sequence_length: int,
        bounds: DocumentBounds,
        fim: FillInMiddle | None = None,
    ):
        self.sequence_length = sequence_length
        self.document_index = indices["document_index"]
        self.sample_index = indices["sample_index"]
        self.shuffle_index = indices["shuffle_index"]
        self._open_tokens, self._bounds, self._fim = open_tokens, bounds, fim

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)}")
        tokens, num_filled, starts = self._read(index)
        loss_mask = np.ones(self.sequence_length, dtype=np.float32)
        if num_filled <= self.sequence_length:
            loss_mask[num_filled - 1 :] = 0.0
        if self._bounds.eod is not None:
            loss_mask[tokens[:-1] == self._bounds.eod] = 0.0
        return Sample(tokens, loss_mask, *self._resets(starts))

    def pieces(self, index: int) -> list[Piece]:
        """Where the tokens of sample `index` come from, in their order."""
        documents, offset, stop = self._span(index)
        stops = [*self._tokens.sequence_lengths[documents[:-1]].tolist(), stop]
        offsets = [offset] + [0] * (len(documents) - 1)
        # Documents without a token begin nowhere.
        read = [part for part in zip(documents.tolist(), offsets, stops, strict=True) if part[2] > part[1]]
        starts = self._read(index)[2].tolist()
        return [Piece(start, *part[:2]) for start, part in zip(starts, read, strict=False)]

    def _span(self, index: int) -> tuple[np.ndarray, int, int]:
        """The documents of a sample, where it begins in the first, and before which token of the last it ends."""
        sample = int(self.shuffle_index[index])
        (first, offset), (last, last_offset) = self.sample_index[sample : sample + 2].tolist()
        # The boundary token belongs to both neighbours.
        return self.document_index[first : last + 1], offset, last_offset + 1

    def _read(self, index: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Return tokens int64 [s + 1], how many are filled, and int32 [k] where documents begin among them."""
        read = self._tokens.read_span(*self._span(index), self.sequence_length + 1)
        return read if self._fim is None else self._fim(index, *read)

    @cached_property
    def _tokens(self) -> IndexedDataset:
        return self._open_tokens()

    def _resets(self, starts: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """starts: int32 [k], where documents begin among the s + 1 tokens. -> position_ids, segment_ids."""
        if not (self._bounds.reset_positions or self._bounds.reset_attention):
            return None, None
        positions, segments = helpers.number_documents(starts, self.sequence_length)
        return (
            positions if self._bounds.reset_positions else None,
            segments if self._bounds.reset_attention else None,
        )


class GPTDataset(GPTSamples):
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
        bounds: DocumentBounds = DocumentBounds(),
        fim: FillInMiddle | None = None,
        cache_path: Path | None = None,
    ):
        self.tokens_per_epoch, self._plan = _checked_plan(indexed, document_range, num_samples, sequence_length)
        # The plan stands for the number of samples: runs that differ only in that share their indices.
        self._key: dict[str, str | int | bool] = {
            "version": INDEX_CODE_VERSION,
            "data": indexed.fingerprint,
            "documents": f"{document_range.start}:{document_range.stop}",
            "sequence_length": sequence_length,
            "seed": seed,
            "num_epochs": self._plan.num_epochs,
            "separate_final_epoch": self._plan.separate_final_epoch,
            "drop_last_partial": drop_last_partial,
        }
        request = IndexRequest(indexed, document_range, num_samples, sequence_length, seed, drop_last_partial)
        folder = cache_path if cache_path is not None else default_cache_path(indexed.prefix)
        indices = cached_entry(folder, "gpt", self._key, lambda writer: request.build(writer.save))
        super().__init__(lambda: indexed, indices, sequence_length, bounds, fim)
        self.contents = (indexed.fingerprint,)
        """Of the tokens, whatever their order: one for one dataset."""

    @property
    def fingerprint(self) -> str:
        """Identifies the data and its order: a run that resumes on another one continues a different sequence."""
        return " ".join(f"{name}={value}" for name, value in self._key.items())

    def has_same_order_for(self, num_samples: int | None) -> bool:
        """Whether this dataset, built for `num_samples` instead, would serve the same samples in the same order."""
        return plan_epochs(self.tokens_per_epoch, self.sequence_length, num_samples) == self._plan


@dataclass(frozen=True)
class IndexRequest:
    """The indices that `GPTSamples` reads by: how large they are, and what is in them; nothing is cached.

    Raises DataError where there is no sample to be had.
    """

    indexed: IndexedDataset
    documents: range
    num_samples: int | None
    sequence_length: int
    seed: int
    drop_last_partial: bool = True

    @cached_property
    def sizes(self) -> IndexSizes:
        tokens_per_epoch, plan = self._checked
        return index_sizes(
            self.documents,
            plan,
            tokens_per_epoch=tokens_per_epoch,
            sequence_length=self.sequence_length,
            drop_last_partial=self.drop_last_partial,
        )

    def build(self, emit: Emit) -> None:
        """Hands the arrays to `emit`, each of the form that `sizes` tells beforehand."""
        tokens_per_epoch, plan = self._checked
        build_indices(
            emit,
            self.indexed.sequence_lengths,
            self.documents,
            plan,
            tokens_per_epoch=tokens_per_epoch,
            sequence_length=self.sequence_length,
            seed=self.seed,
            drop_last_partial=self.drop_last_partial,
        )

    @cached_property
    def _checked(self) -> tuple[int, EpochPlan]:
        return _checked_plan(self.indexed, self.documents, self.num_samples, self.sequence_length)


def _checked_plan(
    indexed: IndexedDataset, documents: range, num_samples: int | None, sequence_length: int
) -> tuple[int, EpochPlan]:
    _check_request(indexed, documents, num_samples, sequence_length)
    tokens_per_epoch = count_tokens(indexed, documents)
    _check_tokens(indexed, documents, num_samples, sequence_length, tokens_per_epoch)
    return tokens_per_epoch, plan_epochs(tokens_per_epoch, sequence_length, num_samples)


def count_tokens(indexed: IndexedDataset, document_range: range) -> int:
    return int(indexed.sequence_lengths[document_range.start : document_range.stop].sum(dtype=np.int64))


def _check_tokens(
    indexed: IndexedDataset, documents: range, num_samples: int | None, sequence_length: int, num_tokens: int
) -> None:
    what = f"{indexed.prefix}: documents {documents.start} to {documents.stop} hold"
    if num_tokens == 0:
        raise DataError(f"{what} 0 tokens, which is no sample; choose other data or another --split.")
    if num_samples is None and num_tokens <= sequence_length:
        raise DataError(
            f"{what} {num_tokens} tokens, less than one sample of sequence length {sequence_length} plus one label; "
            "use a shorter --seq_length, more data or another --split."
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
