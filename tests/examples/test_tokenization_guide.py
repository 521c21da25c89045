"""docs/guide/tokenization.md shows what its commands print."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron.errors import MegatronError
from megatron.tokenizer.build import TYPES

REPOSITORY = Path(__file__).parents[2]
GUIDE = (REPOSITORY / "docs" / "guide" / "tokenization.md").read_text()
BLOCK = re.compile(r"```bash\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def run(block: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the commands of `block` print, errors in the place of the output that they end."""
    printed = ""
    for line in block.replace("\\\n", " ").strip().splitlines():
        if not line.startswith("python tools/"):
            subprocess.run(line, shell=True, check=True)
            continue
        _, tool, *arguments = shlex.split(line)
        try:
            runpy.run_path(str(REPOSITORY / tool))["main"](arguments)
        except MegatronError as error:
            print(f"{type(error).__name__}: {error}")
        out, err = capsys.readouterr()
        printed += "".join(f"{line}\n" for line in err.splitlines() if line.startswith("skipped: ")) + out
    return printed


def without_rates(output: str) -> str:
    return re.sub(r" at [\d.]+ MB/s.*", "", output)


def test_the_commands_print_what_is_shown(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gigatoken")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    blocks = BLOCK.findall(GUIDE)
    assert len(blocks) == GUIDE.count("```bash") >= 5
    for commands, output in blocks:
        assert without_rates(run(commands, capsys)) == without_rates(output), commands


def test_every_type_of_tokenizer_has_its_row():
    table = GUIDE[GUIDE.index("| `--tokenizer_type` |") :]
    assert [name for name in TYPES if f"`{name}`" not in table] == []


def test_a_link_to_a_file_leads_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", GUIDE)
    assert links and all((REPOSITORY / "docs" / "guide" / link).exists() for link in links)


def test_every_flag_that_is_named_exists():
    help_texts = "".join(
        runpy.run_path(str(REPOSITORY / "tools" / name))["_parser"]().format_help()
        for name in ("preprocess_data.py", "train_tokenizer.py", "checkpoint_util.py")
    )
    named = set(re.findall(r"(--[a-z_]+)", GUIDE)) - {"--data_path"}
    assert [flag for flag in sorted(named) if flag not in help_texts] == []
