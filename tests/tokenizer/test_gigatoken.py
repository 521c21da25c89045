from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
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


OVERLAPPING = [
    ["---"],
    ["|||IP_ADDRESS|||"],
    ["<|end|><"],
    ["<|end|>", "<|end|>x"],
    ["<|end|>", "x<|end|>"],
    ["<|end|>", "x<|"],
    ["<|end|>", "<"],
    ["<|end|>", "|>x"],
]


@pytest.mark.parametrize("special", OVERLAPPING, ids=" ".join)
def test_no_token_that_may_begin_or_end_in_a_text_stands_between_texts(tmp_path, special):
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(write_huggingface(tmp_path, tuple(special)))))
    fast = GigatokenEncoder(tokenizer, num_threads=2)
    parts = [token[:end] for token in special for end in range(1, len(token))]
    parts += [token[start:] for token in special for start in range(1, len(token))]
    texts = [text for part in parts for text in (f"ab{part}", f"{part}cd", "ef")]
    _assert_equal(fast.encode_batch(texts, 1), tokenizer.encode_batch(texts))


@pytest.mark.parametrize("normalized", [False, True])
def test_a_special_token_among_many_stands_between_texts(tmp_path, normalized):
    """`normalized` as in GPT-2's own tokenizer.json, which normalizes nothing."""
    write_huggingface(tmp_path, special=())
    special = [f"<|{number}|>" for number in range(1000)]
    _change(tmp_path, lambda m: m.add_special_tokens([_added(token, normalized=normalized) for token in special]))
    fast = GigatokenEncoder(build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path))), num_threads=2)
    assert fast._boundary is not None and fast._boundary.token == "<|0|>"


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


def _added(token: str, **how: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, **{"normalized": False, **how})


def _change(folder: Path, change: Callable[[tokenizers.Tokenizer], object]) -> None:
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(model)
    model.save(str(folder / "tokenizer.json"))


def _assert_unavailable(folder: Path, reason: str) -> None:
    with pytest.raises(FastTokenizerUnavailable, match=reason):
        GigatokenEncoder(build_tokenizer(TokenizerConfig(tokenizer_model=str(folder))), num_threads=2)


def test_tokens_found_in_normalized_text_rule_it_out(tmp_path: Path):
    write_huggingface(tmp_path)

    def lower(model: tokenizers.Tokenizer) -> None:
        model.normalizer = tokenizers.normalizers.Lowercase()
        model.add_tokens([_added("[x]", normalized=True)])

    _change(tmp_path, lower)
    _assert_unavailable(tmp_path, "finds added tokens in normalized text")


def test_a_token_that_normalizing_may_compose_rules_it_out(tmp_path: Path):
    """A decomposed syllable becomes the token's bytes, which are then gigatoken's token, and to the tokenizer text."""
    write_huggingface(tmp_path)

    def compose(model: tokenizers.Tokenizer) -> None:
        model.normalizer = tokenizers.normalizers.NFC()
        model.add_tokens([_added("[x]")])

    _change(tmp_path, compose)
    GigatokenEncoder(build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path))), num_threads=2)
    _change(tmp_path, lambda model: model.add_tokens([_added("\ud55c")]))
    _assert_unavailable(tmp_path, "normalized text may hold added tokens unseen")


def test_a_piece_that_is_a_token_too_rules_it_out_where_a_blank_is_put_in_front(tmp_path: Path):
    write_huggingface(tmp_path)

    def prefix(model: tokenizers.Tokenizer) -> None:
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        model.add_tokens([_added(" ")])

    _change(tmp_path, prefix)
    _assert_unavailable(tmp_path, "normalized text may hold added tokens unseen")


def test_what_is_between_tokens_is_compared_where_every_sentence_holds_one(tmp_path: Path):
    write_huggingface(tmp_path, special=())

    def do_not_cut_words(model: tokenizers.Tokenizer) -> None:
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.add_tokens([_added(" ")])

    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["t'"] = 300
    content["model"]["merges"].append(["t", "'"])
    file.write_text(json.dumps(content))
    _change(tmp_path, do_not_cut_words)
    _assert_unavailable(tmp_path, "gigatoken's ids differ from the HuggingFaceTokenizer's")


def test_without_its_package_the_command_that_installs_it_is_named(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(FastTokenizerUnavailable, match="gigatoken is not installed; `pip install gigatoken`"):
        GigatokenEncoder(reference, num_threads=2)
