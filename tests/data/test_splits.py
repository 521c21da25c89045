"""--split cuts the documents as Megatron-LM does, and says when a wanted part is empty."""

from pathlib import Path

import pytest

from megatron.data.splits import parse_split, split_documents
from megatron.errors import ConfigError

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
