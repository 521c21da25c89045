from __future__ import annotations

import hashlib
import re
import runpy
import shlex
from pathlib import Path

from megatron.data.documents import read_texts
from megatron.data.indexed import IndexedDataset

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "examples" / "data" / "pride_and_prejudice.jsonl"
README = (ROOT / "examples" / "data" / "README.md").read_text()


def test_the_corpus_is_the_file_that_its_readme_describes():
    assert f"`{hashlib.sha256(CORPUS.read_bytes()).hexdigest()}`" in README
    assert CORPUS.stat().st_size < 1_000_000
    chapters = list(read_texts([CORPUS], "text"))
    assert [chapter.split("\n\n")[0] for chapter in chapters] == [f"Chapter {n}" for n in range(1, 62)]


def test_the_commands_of_the_readme_turn_it_into_tokens(tmp_path, monkeypatch, capsys):
    commands, output = re.findall(r"```(?:text)?\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands.replace("\\\n", " ").strip().splitlines():
        _, tool, *arguments = shlex.split(command)
        runpy.run_path(str(ROOT / tool))["main"](arguments)
    # The last line is a rate.
    assert capsys.readouterr().out.splitlines()[:-1] == output.splitlines()[:-1]
    assert IndexedDataset("austen_text_document").num_documents == 61
