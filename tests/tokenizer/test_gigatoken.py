from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron.tokenizer.gigatoken import (
    CHECKED_CHARACTERS,
    MIN_PARALLEL_BYTES,
    FastTokenizerMismatch,
    FastTokenizerUnavailable,
    GigatokenEncoder,
)
from tiny_tokenizers import TEXT, write_huggingface, write_sentencepiece

pytest.importorskip("gigatoken")


WRITERS = {
    "sentencepiece": write_sentencepiece,
    "huggingface": write_huggingface,
    "huggingface without special tokens": partial(write_huggingface, special=()),
}


@pytest.fixture(scope="module", params=WRITERS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    model = WRITERS[request.param](tmp_path_factory.mktemp("tokenizer"))
    if "without" in request.param:
        return build_tokenizer(TokenizerConfig(tokenizer_model=str(model)))
    return build_tokenizer(
        TokenizerConfig(tokenizer_model=str(model), vocab_extra_ids=2, vocab_extra_ids_list=("[f]",))
    )


@pytest.fixture(scope="module")
def fast(reference: Tokenizer) -> GigatokenEncoder:
    return GigatokenEncoder(reference, num_threads=2)


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
    "<|begin|>",
    "<|end|>",
    "[f]",
    "<extra_id_1>",
    "<",
]


@given(texts=st.lists(st.lists(st.sampled_from(PIECES)).map("".join) | st.text(max_size=40)))
def test_ids_are_those_of_the_tokenizer(fast, reference, texts):
    _assert_equal(fast.encode_batch(texts, 0), reference.encode_batch(texts))


def test_a_text_that_spells_out_a_token_is_encoded_by_the_tokenizer(fast, reference):
    texts = [f"a{token}b" for token in sorted(reference.literals)] + [TEXT]
    _assert_equal(fast.encode_batch(texts, 0), reference.encode_batch(texts))


@pytest.mark.parametrize("num_texts", [1, 300])
def test_a_long_batch_is_cut_up_without_a_trace(fast, reference, num_texts):
    """The beginnings of lines and the runs of blanks are all different, so that a cut at a wrong place shows."""
    line = "".join(f"{TEXT[i : i + 40]}{' ' * (i % 7)}{i * i}é\n" for i in range(len(TEXT)))
    text = line * (1 + 2 * MIN_PARALLEL_BYTES // len(line))
    size = 1 + len(text) // num_texts
    texts = [text[start : start + size] for start in range(0, len(text), size)]
    assert len(texts) == num_texts
    _assert_equal(fast.encode_batch(texts, 1), reference.encode_batch(texts))


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
        fast = GigatokenEncoder(spy, num_threads=2)
        spy.asked.clear()
        fast.encode_batch(texts, seed)
        asked.append(spy.asked)
    assert [len(texts) for texts in asked] == [5, 5, 5]
    assert asked[0] == asked[1] != asked[2]


def test_a_window_of_a_long_text_is_compared(reference):
    spy = _Spy(reference)
    fast = GigatokenEncoder(spy, num_threads=2)
    spy.asked.clear()
    long = "".join(f"{i} " for i in range(200_000))
    fast.encode_batch(["a", long], 1)
    (window,) = spy.asked
    assert window in long and len(window) == len(long) // 1000 < CHECKED_CHARACTERS


def test_of_a_text_that_is_too_long_to_compare_the_beginning_is(reference):
    spy = _Spy(reference)
    fast = GigatokenEncoder(spy, num_threads=2)
    spy.asked.clear()
    long = "b" + "a" * CHECKED_CHARACTERS
    fast.encode_batch([long], 0)
    assert spy.asked == [long[:CHECKED_CHARACTERS]]


@pytest.mark.parametrize("num_boundaries", [0, 2])
def test_ids_that_cannot_be_told_apart_text_by_text_are_refused(tmp_path, monkeypatch, num_boundaries):
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(write_huggingface(tmp_path))))
    fast = GigatokenEncoder(tokenizer, num_threads=2)
    ids = [tokenizer.token_id("<|begin|>")] * num_boundaries + [5]

    monkeypatch.setattr(fast, "_encode_row", lambda row: np.array(ids, np.int32) if row == b"a<|begin|>b" else None)
    with pytest.raises(FastTokenizerMismatch, match=f"gigatoken gave 2 texts back as {num_boundaries + 1}"):
        fast.encode_batch(["a", "b"], 1)


def test_a_failure_of_the_library_is_a_mismatch(fast, monkeypatch):
    class Library:
        def __getattr__(self, name: str) -> object:
            raise BaseException("panicked")

    monkeypatch.setattr(fast, "_fast", Library())
    with pytest.raises(FastTokenizerMismatch, match=r"gigatoken failed \(panicked\)"):
        fast.encode_batch(["a", "b"], 1)


def test_a_text_that_differs_is_found_and_quoted(reference):
    fast = GigatokenEncoder(_Spy(reference, lie_about="zebra"), num_threads=2)
    with pytest.raises(FastTokenizerMismatch, match=f"gigatoken's ids differ from the {reference.name}'s in 'a zebra'"):
        fast.encode_batch(["a zebra"], 0)


def test_a_tokenizer_that_differs_on_the_sample_is_not_used(reference):
    with pytest.raises(FastTokenizerUnavailable, match="ids differ from the"):
        GigatokenEncoder(_Spy(reference, "zebra"), num_threads=2, sample=["a zebra"])
    with pytest.raises(FastTokenizerUnavailable, match="ids differ from the"):
        GigatokenEncoder(_Spy(reference, "naïve"), num_threads=2)


def test_a_tokenizer_that_it_does_not_know_is_not_used():
    with pytest.raises(FastTokenizerUnavailable, match="gigatoken has no NullTokenizer"):
        GigatokenEncoder(build_tokenizer(TokenizerConfig(vocab_size=5)), num_threads=2)


def test_tokens_found_in_normalized_text_rule_it_out(tmp_path: Path):
    import tokenizers

    write_huggingface(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.add_tokens([tokenizers.AddedToken("[x]", normalized=True)])
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FastTokenizerUnavailable, match="finds added tokens in normalized text"):
        GigatokenEncoder(build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path))), num_threads=2)


def test_without_its_package_the_command_that_installs_it_is_named(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(FastTokenizerUnavailable, match="gigatoken is not installed; `pip install gigatoken`"):
        GigatokenEncoder(reference, num_threads=2)
