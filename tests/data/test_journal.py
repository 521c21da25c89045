"""What several datasets of one interrupted run have in common, and what becomes of them when they have not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.data.encoding import EncodedTexts
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import preprocess_files
from megatron.data.preprocess_config import PreprocessConfig
from megatron.data.unfinished import UnfinishedDatasets
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import TokenizerConfig, build_tokenizer

NUM_DOCUMENTS = 10


def _open(*prefixes: Path) -> UnfinishedDatasets:
    return UnfinishedDatasets(prefixes, [np.dtype(np.uint16)] * len(prefixes), {}, journal_interval_s=0.0)


def _append(datasets: UnfinishedDatasets, value: int) -> None:
    """One token a document. The journal is on the disk afterwards."""
    texts = EncodedTexts(
        np.full(NUM_DOCUMENTS, value, np.uint16), np.ones(NUM_DOCUMENTS, np.int32), np.ones(NUM_DOCUMENTS, np.int32)
    )
    datasets.append([texts] * len(datasets.folders), dict)
    datasets._wait()


def _interrupt(*prefixes: Path, value: int) -> None:
    with _open(*prefixes) as datasets:
        datasets.open(datasets.read_journal())
        _append(datasets, value)


def _finish(*prefixes: Path) -> None:
    with _open(*prefixes) as datasets:
        datasets.open(datasets.read_journal())
        datasets.finish()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_datasets_of_different_interrupted_runs_are_not_continued_as_one(tmp_path, order):
    """Not even where one is as long as the other's journal says."""
    pair = tmp_path / "one", tmp_path / "two"
    alone = pair[order[1]]
    _interrupt(*pair, value=1)
    shutil.rmtree(f"{alone}.unfinished")
    _interrupt(alone, value=2)
    with pytest.raises(DataError) as refused, _open(*pair) as datasets:
        datasets.read_journal()
    folders = [f"{prefix}.unfinished" for prefix in pair]
    assert str(refused.value) == (
        f"{' and '.join(folders)} do not hold parts of one interrupted run; one that wrote only some of the datasets "
        f"goes on with its own command, and removing {' and '.join(folders)} starts from nothing."
    )
    _finish(alone)
    assert IndexedDataset(alone).tokens.tolist() == [2] * NUM_DOCUMENTS
    with pytest.raises(DataError, match="do not hold parts of one"), _open(*pair) as datasets:
        datasets.read_journal()  # of one folder nothing is left
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    _interrupt(*pair, value=3)
    _finish(*pair)
    assert [IndexedDataset(prefix).tokens.tolist() for prefix in pair] == [[3] * NUM_DOCUMENTS] * 2


def test_one_key_of_an_interrupted_run_is_not_overwritten_by_a_run_of_its_own(tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=10))
    corpus = tmp_path / "a.jsonl"
    corpus.write_text(json.dumps({"one": "1", "two": "2"}) + "\n")
    pair = {key: tmp_path / key for key in ("one", "two")}
    _interrupt(*pair.values(), value=1)
    for key, prefix in pair.items():
        with pytest.raises(ConfigError, match=rf"{key}\.unfinished: an interrupted run; continue it with --resume, or"):
            preprocess_files([corpus], {key: prefix}, tokenizer, PreprocessConfig())


def test_a_run_killed_between_the_journals_of_its_datasets_goes_on(tmp_path):
    pair = tmp_path / "one", tmp_path / "two"
    _interrupt(*pair, value=1)
    for folder in _open(*pair).folders:
        earlier = (folder / "journal.json").read_bytes()
        with _open(*pair) as datasets:
            datasets.open(datasets.read_journal())
            _append(datasets, 2)
        (folder / "journal.json").write_bytes(earlier)
        with _open(*pair) as datasets:
            journal = datasets.read_journal()
            assert journal is not None
            datasets.open(journal)
    num_tokens = {size["tokens"] // 2 for size in journal.num_bytes}
    _finish(*pair)
    assert [IndexedDataset(prefix).num_tokens for prefix in pair] == [*num_tokens] * 2
    for prefix in pair:
        tokens = IndexedDataset(prefix).tokens.tolist()
        assert tokens == sorted(tokens) and tokens[:NUM_DOCUMENTS] == [1] * NUM_DOCUMENTS
