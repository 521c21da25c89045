from __future__ import annotations

import base64
import itertools
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import ConfigError, TokenizerError
from megatron.tokenizer.huggingface import HuggingFaceTokenizer
from megatron.tokenizer.tiktoken import ENCODINGS, TikTokenizer, is_ranks_file
from tiny_tokenizers import TEXT, write_huggingface, write_ranks, write_sentencepiece

SAMPLES = [
    TEXT,
    "I'Ve 12345 cents\r\n\n  x = foo(bar)//  ÉTÉ naïve 漢字かな \u0301 \U0001f600\t",
    "aB ABc HTTPServer's",
]


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("huggingface"))


@pytest.fixture(scope="module")
def ranks_file(huggingface: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ranks(huggingface, tmp_path_factory.mktemp("ranks"))


def _oracle(ranks_file: Path, pattern: str, text: str) -> list[int]:
    """What tiktoken defines: in every word merge the two neighbours whose union has the lowest rank, until none has."""
    lines = (line.split() for line in ranks_file.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    ids = []
    for word in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
            rank, i = min(pairs, default=(len(ranks), 0))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(text=st.sampled_from(SAMPLES) | st.text(alphabet="thea n'S\n1É漢-", max_size=60))
def test_ids_are_those_of_the_definition(ranks_file, encoding, text):
    tokenizer = TikTokenizer(ranks_file, encoding=encoding)
    assert tokenizer.encode(text) == _oracle(ranks_file, ENCODINGS[encoding].pattern, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_gpt2_are_those_of_its_byte_level_bpe(ranks_file, huggingface):
    for text in SAMPLES:
        assert TikTokenizer(ranks_file, encoding="gpt2").encode(text) == HuggingFaceTokenizer(huggingface).encode(text)


def test_special_tokens_have_the_published_distances_to_the_ranks(ranks_file):
    llama3 = TikTokenizer(ranks_file, encoding="llama3")
    assert (llama3.bos, llama3.eos, llama3.eod, llama3.vocab_size) == (300, 301, 301, 300 + 256)
    names = {token: llama3.library.token_to_id(f"<|{token}|>") - 300 for token in ("eot_id", "python_tag")}
    assert names == {"eot_id": 9, "python_tag": 10}
    assert llama3.library.id_to_token(555) == "<|reserved_special_token_247|>"
    cl100k = TikTokenizer(ranks_file, encoding="cl100k", vocab_extra_ids=1)
    assert (cl100k.bos, cl100k.eos, cl100k.library.token_to_id("<|endofprompt|>")) == (None, 301, 320)
    assert cl100k.added_tokens == {"<extra_id_0>": 321}


def test_special_tokens_that_a_text_spells_out_stay_text_unless_asked_for(ranks_file):
    text = "a<|eot_id|>b"
    tokenizer = TikTokenizer(ranks_file, encoding="llama3")
    assert max(tokenizer.encode(text)) < 300
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 309 in TikTokenizer(ranks_file, encoding="llama3", parse_special=True).encode(text)
    assert 309 in TikTokenizer(ranks_file, encoding="llama3", extra_tokens=["<|eot_id|>"]).encode(text)


def test_the_number_of_ranks_names_the_published_encodings(tmp_path, ranks_file):
    known = ranks_file.read_text()
    fill = [f"{base64.b64encode(f'#{i}'.encode()).decode()} {i}" for i in range(300, 50_256)]
    (tmp_path / "r50k.tiktoken").write_text(known + "\n".join(fill))
    assert TikTokenizer(tmp_path / "r50k.tiktoken").eod == 50_256
    with pytest.raises(
        ConfigError, match=r"has 300 ranks and is none .* --tiktoken_encoding llama3, cl100k, o200k, gpt2"
    ):
        TikTokenizer(ranks_file)


def test_the_identity_changes_with_the_encoding(ranks_file):
    identities = {TikTokenizer(ranks_file, encoding=name).identity.fingerprint for name in ENCODINGS}
    assert len(identities) == len(ENCODINGS)


def test_a_sentencepiece_model_of_the_same_name_is_told_apart(tmp_path, ranks_file, huggingface):
    assert is_ranks_file(ranks_file)
    assert not is_ranks_file(write_sentencepiece(tmp_path))
    assert not is_ranks_file(huggingface / "tokenizer.json")
    assert not is_ranks_file(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:5], "%% 5", *lines[6:]], r"tokenizer\.model:6: b'%% 5' is not the base64"),
        (lambda lines: [*lines[:-1], "QUFB 999"], "the ranks do not count from 0 to 299; the file is damaged"),
        (lambda lines: lines[1:], r"byte \d+ has no rank; the file is damaged"),
    ],
)
def test_a_damaged_file_is_an_error_that_says_where(tmp_path, ranks_file, change, message):
    (tmp_path / "tokenizer.model").write_text("\n".join(change(ranks_file.read_text().splitlines())))
    with pytest.raises(TokenizerError, match=message):
        TikTokenizer(tmp_path / "tokenizer.model", encoding="gpt2")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"cannot read .*none: No such file.*names a file of ranks"):
        TikTokenizer(tmp_path / "none")
