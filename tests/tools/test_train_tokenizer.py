from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.errors import ConfigError, DataError, TokenizerError
from megatron.tokenizer import TokenizerConfig, build_tokenizer
from tiny_tokenizers import TEXT

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the tool in this process and returns what it prints."""
    main = runpy.run_path(str(TOOLS / "train_tokenizer.py"))["main"]

    def run(*arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl"])
def test_a_tokenizer_is_trained_on_plain_text_and_on_json_lines(tmp_path, train, name):
    text = TEXT if name.endswith(".txt") else json.dumps({"body": TEXT}) + "\n"
    (tmp_path / name).write_text(text)
    flags = ("--input", tmp_path / name, "--output", tmp_path / "tok")
    printed = train(*flags, "--vocab_size", 320, "--json_key", "body")
    tokenizer = build_tokenizer(TokenizerConfig(vocab_file=str(tmp_path / "tok" / "tokenizer.model")))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert f"wrote {tmp_path}/tok/tokenizer.model: 320 pieces (bpe)" in printed
    assert "bytes of it make a token" in printed
    pieces = printed.split("segmented: ")[1].split()
    assert TEXT.startswith("".join(pieces).replace("▁", " ").strip())


def test_the_output_may_name_the_model_file(tmp_path, train):
    (tmp_path / "a.txt").write_text(TEXT)
    flags = ("--input", tmp_path / "a.txt", "--output", tmp_path / "mine.model", "--vocab-size", 310)
    train(*flags, "--model-type", "unigram")
    assert (tmp_path / "mine.model").is_file()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (("--input", "a.txt"), TokenizerError, "--vocab_size 32000 is more pieces than this text has"),
        (("--input", "empty.txt"), TokenizerError, "there is no text to train a tokenizer on"),
        (("--input", "none.txt"), DataError, "cannot read none.txt"),
        (("--input", "a.txt", "--vocabsize", "5"), ConfigError, r"did you mean --vocab_size\?"),
        (("--input", "a.txt", "--vocab_size", "0"), TokenizerError, "--vocab_size 0 has no room"),
        (("--input", "a.txt", "--workers", "0"), ConfigError, "--workers 0 cannot do any work"),
        *(
            (("--input", "a.txt", "--max_text_mb", mb), ConfigError, f"--max_text_mb {mb} is not a size of text; give")
            for mb in ("nan", "inf", "0", "-1")
        ),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(tmp_path, monkeypatch, train, flags, error, message):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train(*flags, "--output", "tok")
    assert not (tmp_path / "tok").exists()
