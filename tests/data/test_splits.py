"""--split cuts the documents as Megatron-LM does, and says when a wanted part is empty."""

from pathlib import Path

import pytest

from megatron.data.indexed import IndexedDataset
from megatron.data.splits import build_gpt_splits, parse_split, split_documents
from megatron.errors import ConfigError, DataError

BASE = Path(__file__).parent / "samples" / "gpt" / "base"


def bounds(text: str, num_documents: int) -> list[int]:
    ranges = split_documents(parse_split(text), num_documents)
    return [ranges[0].start, *(part.stop for part in ranges)]


@pytest.mark.parametrize("text", ["969, 30, 1", "969,30,1", "969/30/1", "0.969,0.03,0.001", " 1938 / 60 / 2 "])
def test_969_30_1_of_1000_documents_cuts_at_969_and_999_in_every_spelling(text: str):
    assert bounds(text, 1000) == [0, 969, 999, 1000]


def test_small_shares_of_few_documents_get_none():
    assert bounds("969,30,1", 10) == [0, 10, 10, 10]


def test_shares_left_out_are_zero():
    assert bounds("1", 7) == [0, 7, 7, 7]
    assert bounds("1,1", 8) == [0, 4, 8, 8]


def test_the_parts_cover_all_documents_once():
    for text in ("969,30,1", "90,8,2", "1,1,1", "0.1,0.2,0.7", "0,1,0"):
        for num_documents in range(50):
            ranges = split_documents(parse_split(text), num_documents)
            assert [document for part in ranges for document in part] == list(range(num_documents))


@pytest.mark.parametrize("text", ["", "a,b,c", "1,2,3,4", "-1,1,1", "0,0,0", "nan,1,1", "inf,1,1", "1/1,1"])
def test_a_split_that_is_no_shares_is_an_error(text: str):
    with pytest.raises(ConfigError, match=r"--split .* is not one to three shares .*; use for example --split 969,30"):
        parse_split(text)


def test_datasets_read_their_own_documents_and_unwanted_ones_are_none(tmp_path: Path):
    train, valid, test = build_gpt_splits(
        IndexedDataset(BASE), "50,30,20", (100, None, 0), sequence_length=16, seed=3, cache_path=tmp_path
    )
    assert train is not None and valid is not None and test is None
    assert len(train) >= 100
    assert set(train.document_index.tolist()) == set(range(30))
    assert set(valid.document_index.tolist()) == set(range(30, 48))


@pytest.mark.parametrize(("wanted", "what"), [(10, "10 samples"), (None, "one epoch")])
def test_a_wanted_split_without_documents_is_an_error_before_anything_is_built(
    wanted: int | None, what: str, tmp_path: Path
):
    """0.1% of 60 documents is rounded to none."""
    reason = rf"--split '98,1.9,0.1' of 60 documents leaves none for test \(wanted: {what}\); give test a larger share"
    with pytest.raises(DataError, match=reason):
        build_gpt_splits(
            IndexedDataset(BASE), "98,1.9,0.1", (10, 10, wanted), sequence_length=16, seed=3, cache_path=tmp_path
        )
    assert list(tmp_path.iterdir()) == []


def test_an_unwanted_split_may_be_empty(tmp_path: Path):
    train, *others = build_gpt_splits(
        IndexedDataset(BASE), "1", (10, 0, 0), sequence_length=16, seed=3, cache_path=tmp_path
    )
    assert train is not None and others == [None, None]
