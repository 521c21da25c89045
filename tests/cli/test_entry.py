"""How a command ends: its exit status, and who prints what."""

import subprocess
import sys

import pytest

from megatron.cli import entry, run_main, warn
from megatron.errors import CheckpointError, ConfigError


@pytest.fixture
def on_rank(monkeypatch):
    """Pretends to be one rank of a launch on hosts of four; records the pauses instead of making them."""
    pauses: list[float] = []

    def become(rank: int) -> list[float]:
        for name, value in {"RANK": rank, "WORLD_SIZE": 8, "LOCAL_RANK": rank % 4, "LOCAL_WORLD_SIZE": 4}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(entry.time, "sleep", pauses.append)
        return pauses

    return become


def fails_with(error):
    def main(argv):
        raise error

    return main


def test_main_gets_the_arguments_and_ends_normally():
    seen = []
    run_main(seen.extend, ["--lr", "1"])
    assert seen == ["--lr", "1"]


@pytest.mark.parametrize("rank", [0, 4])
def test_local_rank_0_prints_a_shared_error_once_and_leaves_with_status_2(rank, on_rank, capsys):
    on_rank(rank)
    with pytest.raises(SystemExit) as caught:
        run_main(fails_with(ConfigError("--lr -1 is negative; use 0 or more.")), [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "ConfigError: --lr -1 is negative; use 0 or more.\n"


def test_the_other_ranks_wait_for_the_launcher_to_end_them_and_speak_if_it_does_not(on_rank, capsys):
    """The launcher ends them as soon as local rank 0 failed too; if it did not, nobody else knows of the error."""
    pauses = on_rank(3)
    with pytest.raises(SystemExit) as caught:
        run_main(fails_with(ConfigError("x")), [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "[rank 3] ConfigError: x\n"
    assert pauses == [entry.LOCAL_RANK_0_GRACE_S]


def test_an_error_of_one_rank_is_printed_by_it_at_once_with_its_number(on_rank, capsys):
    pauses = on_rank(5)
    with pytest.raises(SystemExit) as caught:
        run_main(fails_with(CheckpointError("shard damaged.", this_rank_only=True)), [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "[rank 5] CheckpointError: shard damaged.\n"
    assert pauses == []


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        ("pass", 0, ""),
        ("raise ConfigError('x')", 2, "ConfigError: x\n"),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_command_with_a_process_group_leaves_with_the_status_of_any_other(ending, status, error):
    """What would run at the interpreter's end does not run, and what was printed is not lost."""
    script = (
        "import atexit, sys; from megatron.cli import run_and_leave; from megatron.errors import ConfigError\n"
        f"def main(argv):\n    print('done', end='')\n    {ending}\n"
        "atexit.register(print, 'torn down')\n"
        "run_and_leave(main)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, error in ended.stderr) == (status, True)
    assert ended.stdout == ("done" if "1 / 0" not in ending else "donetorn down\n")


@pytest.mark.parametrize("how", ["print('line\\n' * 100_000)", "print('line')", "print('line', flush=True)"])
def test_a_reader_that_stops_reading_is_no_error(how):
    script = f"import time; from megatron.cli import run_main\nrun_main(lambda argv: (time.sleep(0.2), {how}), [])"
    command = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    assert (command.stderr.read(), command.wait(60)) == (b"", 141)


def test_a_broken_pipe_elsewhere_is_a_bug_like_any_other():
    script = "from megatron.cli import run_main\ndef main(argv): raise BrokenPipeError\nrun_main(main, [])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "BrokenPipeError" in ended.stderr) == (1, True)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda argv: 1 / 0, [])


def test_a_warning_is_printed_once_per_host(on_rank, capsys):
    on_rank(4)
    warn("careful")
    on_rank(5)
    warn("careful")
    assert capsys.readouterr().err == "warning: careful\n"
