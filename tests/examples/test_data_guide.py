"""docs/guide/data.md: what its commands print, and that its programs take the flags it shows."""

from __future__ import annotations

import contextlib
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron.config import parse_run
from megatron.data.indexed import IndexedDataset
from megatron.data.instruct import Conversations
from object_server import serve_bucket

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "docs" / "guide" / "data.md"
BLOCK = re.compile(r"```bash\n([^`]*)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def run(block: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the commands of `block` print, skipped lines first."""
    printed = ""
    for line in block.replace("\\\n", " ").strip().splitlines():
        if not line.startswith("python tools/"):
            subprocess.run(line, shell=True, check=True)
            continue
        _, tool, *arguments = shlex.split(line)
        with contextlib.suppress(SystemExit):  # a fault is found
            runpy.run_path(str(REPOSITORY / tool))["main"](arguments)
        out, err = capsys.readouterr()
        printed += "".join(f"{line}\n" for line in err.splitlines() if line.startswith("skipped: ")) + out
    return printed


def without_rates(output: str) -> str:
    return re.sub(r" at [\d.]+ MB/s.*| in [\d.]+ s$", "", output, flags=re.MULTILINE)


def test_the_commands_print_what_is_shown(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    shown = [(commands, output) for commands, output in BLOCK.findall(GUIDE.read_text()) if output]
    assert len(shown) >= 2
    with serve_bucket("corpora") as bucket:
        for commands, output in shown:
            if "s3://" in commands:
                bucket.put(Path("first_text_document"), "austen/first_text_document")
            assert without_rates(run(commands, capsys)) == without_rates(output), commands
    # One end for each of three messages, and none for the one that a message spells out.
    tokens = Conversations("qa").text.get(1).tolist()
    assert tokens.count(tokens[0] + 1) == 3
    assert len(IndexedDataset("chat-role")) == 1


def test_finetune_takes_the_flags_that_are_shown():
    trained = [commands.replace("\\\n", " ") for commands, output in BLOCK.findall(GUIDE.read_text()) if not output]
    assert trained
    for command in trained:
        name, *words = shlex.split(command)
        assert name == "torchrun"
        parse_run(words[words.index("finetune.py") + 1 :])


def test_a_link_to_a_file_leads_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", GUIDE.read_text())
    assert links and all((GUIDE.parent / link).exists() for link in links)
