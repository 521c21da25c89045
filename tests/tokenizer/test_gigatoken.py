from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron.tokenizer.gigatoken import (
    CHECKED_CHARACTERS,
    FastTokenizerMismatch,
    FastTokenizerUnavailable,
    GigatokenEncoder,
)
from tiny_tokenizers import TEXT, write_huggingface, write_sentencepiece

pytest.importorskip("gigatoken")


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    write = write_sentencepiece if request.param == "sentencepiece" else write_huggingface
    return build_tokenizer(
        TokenizerConfig(tokenizer_model=str(write(folder)), vocab_extra_ids=2, vocab_extra_ids_list=("[f]",))
    )


@pytest.fixture(scope="module", params=[True, False])
def fast(request: pytest.FixtureRequest, reference: Tokenizer) -> GigatokenEncoder:
    return GigatokenEncoder(reference, num_threads=2, in_bulk=request.param)


def _assert_equal(ours: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in expected]
    assert all(ids.dtype == np.int32 for ids in ours)


PIECES = [
    "a",
    " ",
    "  ",
    "\n",
    "Bennet",
    "é",
    "漢",
    "\0",
    "7",
    "'s",
    "</s>",
    "<s>",
    "<|end|>",
    "[f]",
    "<extra_id_1>",
    "<",
]


@settings(max_examples=40)  # the first call starts threads
@given(texts=st.lists(st.lists(st.sampled_from(PIECES)).map("".join) | st.text(max_size=40)))
def test_ids_are_those_of_the_tokenizer(fast, reference, texts):
    _assert_equal(fast.encode_batch(texts, 0), reference.encode_batch(texts))


def test_a_text_that_spells_out_a_token_is_encoded_by_the_tokenizer(fast, reference):
    texts = [f"a{token}b" for token in sorted(reference.literals)] + [TEXT]
    assert len(texts) > 4
    _assert_equal(fast.encode_batch(texts, 0), reference.encode_batch(texts))


class _Spy:
    """A tokenizer that remembers what it was asked, and may lie about one text."""

    def __init__(self, tokenizer: Tokenizer, lie_about: str = "nothing"):
        self._tokenizer, self._lie_about = tokenizer, lie_about
        self.asked: list[str] = []

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        self.asked += texts
        honest = self._tokenizer.encode_batch(texts)
        return [ids[::-1] if self._lie_about in text else ids for ids, text in zip(honest, texts, strict=True)]

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    @property
    def __class__(self) -> type:  # isinstance sees what is spied on
        return type(self._tokenizer)


def test_one_text_in_a_thousand_is_compared_the_same_ones_in_every_run(reference):
    texts = [f"number {i}" for i in range(5000)]
    asked = []
    for seed in (0, 0, 123_456_789):
        spy = _Spy(reference)
        fast = GigatokenEncoder(spy, num_threads=1, in_bulk=False)
        spy.asked.clear()
        fast.encode_batch(texts, seed)
        asked.append(spy.asked)
    assert [len(texts) for texts in asked] == [5, 5, 5]
    assert asked[0] == asked[1] != asked[2]


def test_a_window_of_a_long_text_is_compared(reference):
    spy = _Spy(reference)
    fast = GigatokenEncoder(spy, num_threads=1, in_bulk=False)
    spy.asked.clear()
    long = "".join(f"{i} " for i in range(200_000))
    fast.encode_batch(["a", long], 1)
    (window,) = spy.asked
    assert window in long and len(window) == len(long) // 1000 < CHECKED_CHARACTERS


def test_a_text_that_differs_is_found_and_quoted(reference):
    fast = GigatokenEncoder(_Spy(reference, lie_about="zebra"), num_threads=1, in_bulk=False)
    with pytest.raises(FastTokenizerMismatch, match=f"gigatoken's ids differ from the {reference.name}'s in 'a zebra'"):
        fast.encode_batch(["a zebra"], 0)


def test_a_tokenizer_that_differs_on_the_sample_is_not_used(reference):
    with pytest.raises(FastTokenizerUnavailable, match="ids differ from the"):
        GigatokenEncoder(_Spy(reference, "zebra"), num_threads=1, in_bulk=False, sample=["a zebra"])
    with pytest.raises(FastTokenizerUnavailable, match="ids differ from the"):
        GigatokenEncoder(_Spy(reference, "naïve"), num_threads=1, in_bulk=False)


def test_a_tokenizer_that_it_does_not_know_is_not_used():
    with pytest.raises(FastTokenizerUnavailable, match="gigatoken has no NullTokenizer"):
        GigatokenEncoder(build_tokenizer(TokenizerConfig(vocab_size=5)), num_threads=1, in_bulk=False)


def test_tokens_found_in_normalized_text_rule_it_out(tmp_path: Path):
    import tokenizers

    write_huggingface(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.add_tokens([tokenizers.AddedToken("[x]", normalized=True)])
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FastTokenizerUnavailable, match="finds added tokens in normalized text"):
        GigatokenEncoder(build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path))), num_threads=1, in_bulk=False)


def test_without_its_package_the_command_that_installs_it_is_named(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(FastTokenizerUnavailable, match="gigatoken is not installed; `pip install gigatoken`"):
        GigatokenEncoder(reference, num_threads=1, in_bulk=False)
