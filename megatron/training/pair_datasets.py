"""BERT's data of a run: sentences of one source or a blend of several, as pairs of texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from megatron.config import RunConfig
from megatron.data.bert import BertDataset, PairRequest
from megatron.data.blend import Blend, Member
from megatron.data.epoch_blend import EpochBlend
from megatron.data.indexed import IndexedDataset
from megatron.data.masking import MaskedTokens
from megatron.data.object_store import ObjectStore
from megatron.data.sample import TrainingData
from megatron.data.source import TEXT_SUFFIXES, check_vocabulary
from megatron.errors import DataError
from megatron.tokenizer import Tokenizer


class PairSources:
    """Opens and builds data of sentences. Raises ConfigError for a tokenizer without the tokens that pairs need."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer, cache_path: Path | None, store: ObjectStore):
        self.run, self.cache_path = run, cache_path
        self.special = MaskedTokens.of(tokenizer)
        self._open = cache(partial(IndexedDataset, store=store))
        self._store = store

    def member(self, path: str) -> Member:
        if Path(path).suffix in TEXT_SUFFIXES:
            raise DataError(
                f"{path}: is text, and BERT's data is read from sentences; make them with tools/preprocess_data.py "
                "--split_sentences and give its --output_prefix with the key and _sentence behind it."
            )
        return Member(path, lambda: self._open(path), self._store)

    def build(
        self, blend: Blend, documents: Callable[[int], range], num_samples: int, max_epochs: float | None
    ) -> TrainingData:
        """`documents` gives the documents of a source from their number."""
        members = [self._builder(path, documents) for path in blend.paths]
        if len(members) == 1 and max_epochs is None:
            return members[0](num_samples)
        return EpochBlend(members, num_samples, blend.weights, max_epochs)

    def _builder(self, path: str, documents: Callable[[int], range]) -> Callable[[int], BertDataset]:
        data, indexed = self.run.data, self._open(path)
        check_vocabulary(indexed, self.run.model.vocab_size)

        def build(num_samples: int) -> BertDataset:
            request = PairRequest(
                documents=documents(indexed.num_documents),
                num_samples=num_samples,
                sequence_length=data.seq_length,
                seed=self.run.training.seed,
                mask_prob=data.mask_prob,
                short_seq_prob=data.short_seq_prob,
            )
            return BertDataset(indexed, request, self.special, self.cache_path)

        return build
