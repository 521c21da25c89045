"""That the benchmark of tokenization runs and says what it measured; how fast that is, an idle machine tells."""

from __future__ import annotations

import json

import pytest

from benchmarks import tokenization
from tiny_tokenizers import TEXT, write_huggingface, write_sentencepiece


@pytest.mark.parametrize("write", [write_huggingface, write_sentencepiece])
def test_both_sides_are_measured_and_compared(tmp_path, capsys, monkeypatch, write):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(tokenization, "RESULT", result := tmp_path / "tokenization.md")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(20)))
    tokenization.main(
        ["--input", f"{tmp_path}/a.jsonl", "--tokenizer_model", str(write(tmp_path / "t")), "--pairs", "1"]
    )
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| ours with gigatoken", "| ours without", "| the library alone"]
    assert all(float(row[2]) > 0 for row in rows)
    first, *others = [line for line in result.read_text().splitlines() if line.startswith("- ")]
    assert first.endswith("no bar" if write is write_sentencepiece else (": met", ": **short**"))
    assert len(others) == 2 and all(line.endswith((": met", ": **short**")) for line in others)
