"""What README.md and the first guide show: every command is one that its program takes.

That the demo's commands also do what they say is what `make demo` proves; the others name weights and machines that
no test has.
"""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron.config import parse_run

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/guide/getting_started.md")
DEMO = REPOSITORY / "examples" / "demo.sh"
# What is not a program of this repository. git and pip fetch; the rest moves about.
OTHERS = {"git", "pip", "cd", "cat", "rm", "export"}


def blocks(text: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(
        r"^run <<'COMMAND'\n(.*?)\nCOMMAND$", text, re.DOTALL | re.MULTILINE
    )


def commands(path: Path) -> list[tuple[str, ...]]:
    lines = "\n".join(blocks(path.read_text())).replace("\\\n", " ").splitlines()
    words = (tuple(shlex.split(line, comments=True)) for line in lines)
    return [command for command in words if command]


def check(command: tuple[str, ...]) -> None:
    """Raises or exits where the program does not take its flags."""
    assignment = re.compile(r"\w+=")
    name, *arguments = itertools.dropwhile(assignment.match, command)  # variables in front are the shell's
    if name == "make":
        assert f"\n{arguments[0]}:" in (REPOSITORY / "Makefile").read_text(), command
    elif name == "torchrun":
        script = arguments.index("finetune.py")
        get_args_parser().parse_args(arguments)
        check_program(arguments[script], arguments[script + 1 :])
    elif name == "python" and arguments[0] != "-m":
        check_program(arguments[0], arguments[1:])
    else:
        assert name in OTHERS or arguments[:2] == ["-m", "pytest"], f"{command}: nothing checks this program"


def check_program(script: str, flags: list[str]) -> None:
    if script == "finetune.py":
        parse_run(flags)
        return
    parser = runpy.run_path(str(REPOSITORY / script))["_parser"]()
    if script == "verify_correctness.py":
        parse_run(parser.parse_known_args(flags)[1])
    else:
        parser.parse_args(flags)


@pytest.mark.parametrize("document", [*DOCUMENTS, "examples/demo.sh"])
def test_programs_take_the_flags_that_are_shown(document: str) -> None:
    shown = commands(REPOSITORY / document)
    assert shown
    for command in shown:
        check(command)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_command_on_the_demos_files_is_the_demos_own(document: str) -> None:
    of_the_demo = commands(DEMO)
    for command in commands(REPOSITORY / document):
        if any("demo/" in word for word in command):
            assert command in of_the_demo


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_link_to_a_file_leads_there(document: str) -> None:
    path = REPOSITORY / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_fall_of_the_loss_that_is_promised_is_the_one_that_the_demo_demands(document: str) -> None:
    (expected,) = re.findall(r"--expected_fall (\S+)", DEMO.read_text())
    promise = " ".join((REPOSITORY / document).read_text().split())
    assert re.search(rf"fall(s|en) by at least {re.escape(expected)}\b", promise)


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(Exception, match="--micro_batch_sice"):
        check(("torchrun", "--nproc_per_node", "4", "finetune.py", "--micro_batch_sice", "4"))


def test_a_program_that_does_not_exist_is_found() -> None:
    with pytest.raises(AssertionError, match="nothing checks"):
        check(("finetune", "--lr", "1"))
