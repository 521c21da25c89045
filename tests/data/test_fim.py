"""Fill in the middle rearranges what a document says, and nothing else, as the seed and the sample's number decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.fim import FillInMiddle, FimTokens, find_fim_tokens
from megatron.errors import ConfigError
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.config import TokenizerConfig
from megatron.tokenizer.null import NullTokenizer
from tiny_tokenizers import TEXT, write_huggingface, write_sentencepiece

NAMES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
S = 400


@pytest.fixture(scope="module", params=["hf", "tokenizer.model"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_huggingface(folder / "hf", eos_token="<|end|>")
    write_sentencepiece(folder)
    return build_tokenizer(
        TokenizerConfig(tokenizer_model=str(folder / request.param), vocab_extra_ids_list=(",".join(NAMES),))
    )


def fim(tokenizer: Tokenizer, rate: float = 1.0, spm_rate: float = 0.5, key: int = 7) -> FillInMiddle:
    return FillInMiddle(tokenizer, find_fim_tokens(tokenizer), rate, spm_rate, key)


def sample(tokenizer: Tokenizer, texts: list[str], room: int = S + 1) -> tuple[np.ndarray, int, np.ndarray]:
    """Documents that end with eod, filled up with zeros."""
    documents = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    ids = [id_ for document in documents for id_ in document]
    starts = np.cumsum([0, *map(len, documents[:-1])], dtype=np.int32)
    tokens = np.zeros(room, np.int64)
    tokens[: len(ids)] = ids
    return tokens, len(ids), starts


def split(tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[str, str, str, bool]:
    """Prefix, middle, suffix and whether it is SPM: read back from one rearranged document, as the paper writes it."""
    ids, found = find_fim_tokens(tokenizer), tokens.tolist()
    assert found[0] == ids.prefix and found[-1] == tokenizer.eod
    at_suffix, at_middle = found.index(ids.suffix), found.index(ids.middle)
    suffix = found[at_suffix + 1 : at_middle]
    if at_suffix == 1:
        return "", tokenizer.decode(found[at_middle + 1 : -1]), tokenizer.decode(suffix), True
    prefix, middle = found[1:at_suffix], found[at_middle + 1 : -1]
    return tokenizer.decode(prefix), tokenizer.decode(middle), tokenizer.decode(suffix), False


TEXTS = [TEXT[:150], TEXT[150:153], TEXT[200:330], "x"]


def test_every_document_is_its_own_characters_in_another_order(tokenizer: Tokenizer) -> None:
    before = sample(tokenizer, TEXTS)
    for number in range(40):
        tokens, filled, starts = fim(tokenizer)(number, *before)
        ends = [*starts[1:].tolist(), filled]
        assert len(starts) == len(TEXTS) and len(tokens) == S + 1 and not tokens[filled:].any()
        for text, start, end in zip(TEXTS, starts.tolist(), ends, strict=True):
            prefix, middle, suffix, is_spm = split(tokenizer, tokens[start:end])
            if is_spm:  # prefix and middle are tokens of one run, whose border cannot be seen
                assert (middle + suffix).replace(" ", "") == text.replace(" ", "")
            else:
                assert prefix + middle + suffix == text


def test_all_three_parts_differ_in_length_and_spm_is_as_frequent_as_asked(tokenizer: Tokenizer) -> None:
    before, count = sample(tokenizer, [TEXT[:150]]), 300
    # PSM without a prefix, 1 of 76, reads like SPM; 4 standard deviations are 0.1.
    for spm_rate, bound in ((0.0, 0.05), (0.25, 0.12), (1.0, 0.0)):
        found = [split(tokenizer, _whole(fim(tokenizer, spm_rate=spm_rate)(n, *before))) for n in range(count)]
        assert abs(np.mean([is_spm for *_, is_spm in found]) - spm_rate) <= bound
    lengths = np.array([[len(part) for part in parts[:3]] for parts in _psm(tokenizer, before, count)])
    assert np.abs(lengths.mean(axis=0) - 50).max() < 4 * 150 / np.sqrt(18 * count)  # of three parts of 150, uniform


def _whole(rearranged: tuple[np.ndarray, int, np.ndarray]) -> np.ndarray:
    return rearranged[0][: rearranged[1]]


def _psm(tokenizer: Tokenizer, before: tuple, count: int) -> list[tuple[str, str, str, bool]]:
    return [split(tokenizer, _whole(fim(tokenizer, spm_rate=0.0)(n, *before))) for n in range(count)]


def test_as_many_documents_as_asked_are_rearranged_and_the_others_left(tokenizer: Tokenizer) -> None:
    before, changed = sample(tokenizer, ["a man"] * 10), 0
    for number in range(60):
        tokens, filled, starts = fim(tokenizer, rate=0.3)(number, *before)
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), filled], strict=True):
            is_changed = int(tokens[start]) == find_fim_tokens(tokenizer).prefix
            changed += is_changed
            if not is_changed:
                assert tokens[start:end].tolist() == [*tokenizer.encode("a man"), tokenizer.eod]
    assert abs(changed / 600 - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 600)
    unchanged = fim(tokenizer, rate=0.0)(0, *before)
    assert all(np.array_equal(a, b) for a, b in zip(unchanged, before, strict=True))


def test_seed_number_and_dataset_decide(tokenizer: Tokenizer) -> None:
    before = sample(tokenizer, TEXTS)
    first = fim(tokenizer)(3, *before)
    assert all(np.array_equal(a, b) for a, b in zip(fim(tokenizer)(3, *before), first, strict=True))
    others = [fim(tokenizer)(4, *before), fim(tokenizer, key=8)(3, *before), fim(tokenizer).of_dataset(1)(3, *before)]
    assert not any(np.array_equal(other[0], first[0]) for other in others)


def test_the_last_document_makes_room_and_keeps_its_middle_whole(tokenizer: Tokenizer) -> None:
    """A sample without room for more: what follows is cut off the text, not off what has been rearranged."""
    texts = [TEXT[:150], TEXT[200:330]]
    before = sample(tokenizer, texts)
    full = before[0][: before[1]], before[1], before[2]
    for number in range(40):
        tokens, filled, starts = fim(tokenizer, spm_rate=0.0)(number, *full)
        assert len(tokens) == before[1] >= filled > before[1] - 12  # one text less may be a few tokens less
        assert len(starts) == 2 and "".join(split(tokenizer, tokens[: starts[1]])[:3]) == texts[0]
        prefix, middle, suffix, _ = split(tokenizer, np.append(tokens[starts[1] : filled], tokenizer.eod))
        assert texts[1].startswith(prefix + middle + suffix) and len(prefix + middle + suffix) > 90


def test_half_a_character_is_not_lost(tokenizer: Tokenizer) -> None:
    ids = np.array([*tokenizer.encode("für 漢字")], np.int64)[1:-1]  # cut off in the middle of a character, in bytes
    before = ids, len(ids), np.zeros(1, np.int32)
    special = set(vars(find_fim_tokens(tokenizer)).values())
    for number in range(20):
        room = np.zeros(len(ids) + 40, np.int64)
        room[: len(ids)] = ids
        tokens, filled, _ = fim(tokenizer)(number, room, *before[1:])
        kept = [token for token in tokens[:filled].tolist() if token not in special]
        text = "".join(sorted(tokenizer.decode(kept))).strip()
        assert sorted(kept) == sorted(ids.tolist()) or text == "".join(sorted(tokenizer.decode(ids.tolist()))).strip()


def test_the_tokens_are_those_named_or_known(tokenizer: Tokenizer, tmp_path: Path) -> None:
    known = find_fim_tokens(tokenizer)
    assert known == FimTokens(*(tokenizer.added_tokens[name] for name in NAMES))
    assert find_fim_tokens(tokenizer, NAMES[::-1]) == FimTokens(known.suffix, known.middle, known.prefix)
    with pytest.raises(ConfigError, match=r"--fim_tokens <a> <b> <c>: not all are tokens of the .* --fim_tokens"):
        find_fim_tokens(tokenizer, ("<a>", "<b>", "<c>"))
    with pytest.raises(ConfigError, match=r"--fim_rate: there is none of the tokens of the NullTokenizer for prefix"):
        find_fim_tokens(NullTokenizer(10))
