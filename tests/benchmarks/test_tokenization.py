"""That the benchmark of tokenization runs and says what it measured; how fast that is, an idle machine tells."""

from __future__ import annotations

import json

import pytest

from benchmarks.tokenization import main
from tiny_tokenizers import TEXT, write_huggingface, write_sentencepiece


@pytest.mark.parametrize("write", [write_huggingface, write_sentencepiece])
def test_both_sides_are_measured_and_compared(tmp_path, capsys, write):
    pytest.importorskip("gigatoken")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(20)))
    main(["--input", f"{tmp_path}/a.jsonl", "--tokenizer_model", str(write(tmp_path / "t")), "--pairs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" MB/s ")[0][:10] for line in lines[1:4]] == ["with gigat", "without, 0", "the librar"]
    assert all(float(line.split(" MB/s ")[0].split()[-1]) > 0 for line in lines[1:4])
    assert [line.split(": ")[-1] in ("met", "short") for line in lines[4:]] == [True, True, True]
