"""The datasets of a run, open and checked before any process group exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.config import RunConfig
from megatron.data.gpt import GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import tokenize_file
from megatron.data.source import check_vocabulary, open_data
from megatron.data.splits import SPLIT_NAMES, build_gpt_splits, parse_split, split_documents
from megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunDatasets:
    """`validation` and `test` are None where the run never evaluates, or has no documents to test on."""

    train: GPTDataset
    validation: GPTDataset | None
    test: GPTDataset | None

    @property
    def num_samples(self) -> Mapping[str, int]:
        """What a checkpoint records: the order of training samples depends on their number."""
        named = zip(SPLIT_NAMES, (self.train, self.validation, self.test), strict=True)
        return {name: len(dataset) for name, dataset in named if dataset is not None}


def build_datasets(run: RunConfig, tokenizer: Tokenizer) -> RunDatasets:
    """Opens the data, checks its ids against the vocabulary, and builds or finds the sample indices.

    Raises DataError or ConfigError, alike on all ranks. Validation always reads the same samples, so that
    its losses can be compared.
    """
    data, training = run.data, run.training
    num_train = training.train_iters * training.global_batch_size
    num_eval = training.eval_iters * training.global_batch_size
    if data.data_path:
        indexed = _open(data.data_path[0], run, tokenizer)
        wanted = (num_train, num_eval, _num_test_samples(indexed, run, num_eval))
        train, validation, test = build_gpt_splits(
            indexed,
            data.split,
            wanted,
            sequence_length=data.seq_length,
            seed=training.seed,
            cache_path=_cache_path(run),
        )
        assert train is not None
        return RunDatasets(train, validation, test)
    sources = (data.train_data_path, data.valid_data_path, data.test_data_path)
    train, validation, test = (
        _whole(_open(paths[0], run, tokenizer), run, count) if paths and count else None
        for paths, count in zip(sources, (num_train, num_eval, num_eval), strict=True)
    )
    assert train is not None
    return RunDatasets(train, validation, test)


def describe_continuation(dataset: GPTDataset, recorded_samples: int | None) -> str | None:
    """What to tell a user whose run has another length than the one it continues; None if nothing changes."""
    if recorded_samples is None or dataset.has_same_order_for(recorded_samples):
        return None
    return (
        f"the checkpoint's run was laid out for {recorded_samples} samples and this one for {len(dataset)}: "
        "the order of the samples changes, so some of this epoch's may come twice and some not at all"
    )


def _open(path: str, run: RunConfig, tokenizer: Tokenizer) -> IndexedDataset:
    indexed = open_data(
        path,
        tokenize_file=partial(tokenize_file, tokenizer=tokenizer),
        tokenizer_fingerprint=tokenizer.identity.fingerprint,
        cache_path=_cache_path(run),
    )
    check_vocabulary(indexed, run.model.vocab_size)
    return indexed


def _whole(indexed: IndexedDataset, run: RunConfig, num_samples: int) -> GPTDataset:
    return GPTDataset(
        indexed,
        range(len(indexed)),
        num_samples,
        run.data.seq_length,
        run.training.seed,
        cache_path=_cache_path(run),
    )


def _num_test_samples(indexed: IndexedDataset, run: RunConfig, wanted: int) -> int:
    """The default split leaves small corpora without test documents; then there is no test, and that is no error."""
    *_, test_documents = split_documents(parse_split(run.data.split), len(indexed))
    return wanted if len(test_documents) else 0


def _cache_path(run: RunConfig) -> Path | None:
    return None if run.data.data_cache_path is None else Path(run.data.data_cache_path)
