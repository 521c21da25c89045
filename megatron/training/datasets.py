"""The datasets of a run, open and checked before any process group exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron.config import RunConfig
from megatron.data.gpt import GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import tokenize_file
from megatron.data.source import check_vocabulary, open_data
from megatron.data.splits import SPLIT_NAMES, build_gpt_splits, parse_split, split_documents
from megatron.tokenizer import Tokenizer
from megatron.training.checkpointing import Progress


@dataclass(frozen=True)
class RunDatasets:
    """`validation` and `test` are None where the run never evaluates, or has no documents to test on.

    `num_samples` is how many of each were asked for. A checkpoint records it, because the order of training
    samples depends on it; the datasets may have more, up to a whole epoch.
    """

    train: GPTDataset
    validation: GPTDataset | None
    test: GPTDataset | None
    num_samples: Mapping[str, int] = field(default_factory=dict)


def build_datasets(run: RunConfig, tokenizer: Tokenizer, start: Progress) -> RunDatasets:
    """Opens the data, checks its ids against the vocabulary, and builds or finds the sample indices.

    The global batch size may have changed at `start`, so the samples are those consumed and those to come. Raises
    DataError or ConfigError, alike on all ranks. Validation always reads the same samples, so that its losses can
    be compared.
    """
    data, training = run.data, run.training
    num_to_come = max(0, training.train_iters - start.iteration) * training.global_batch_size
    num_train = start.consumed_samples + num_to_come
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
        return RunDatasets(train, validation, test, dict(zip(SPLIT_NAMES, wanted, strict=True)))
    sources = (data.train_data_path, data.valid_data_path, data.test_data_path)
    wanted = (num_train, num_eval, num_eval)
    train, validation, test = (
        _whole(_open(paths[0], run, tokenizer), run, count) if paths and count else None
        for paths, count in zip(sources, wanted, strict=True)
    )
    assert train is not None
    return RunDatasets(train, validation, test, dict(zip(SPLIT_NAMES, wanted, strict=True)))


def describe_continuation(datasets: RunDatasets, recorded: Mapping[str, object]) -> str | None:
    """What to tell a user whose run has another length than the one it continues; None if nothing changes.

    `recorded` is the `num_samples` of the run that is continued.
    """
    before, now = recorded.get(SPLIT_NAMES[0]), datasets.num_samples[SPLIT_NAMES[0]]
    if not isinstance(before, int) or datasets.train.has_same_order_for(before):
        return None
    return (
        f"the checkpoint's run was laid out for {before} samples and this one for {now}: "
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
