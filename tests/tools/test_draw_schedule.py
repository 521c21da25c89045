"""tools/draw_schedule.py shows the objects that training executes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.pipeline import Action, Costs, StageCosts, draw, interleaved, lower, one_f_one_b
from megatron.errors import ConfigError

SCRIPT = Path(__file__).parents[2] / "tools" / "draw_schedule.py"
SIZES = ["--pipeline_model_parallel_size", "4", "--num_microbatches", "8"]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("draw_schedule", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_command_of_the_docstring_draws_1f1b():
    command = [sys.executable, str(SCRIPT), "--schedule", "1f1b", *SIZES]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == draw(one_f_one_b(4, 8)) + "\n"


def test_a_bad_value_ends_with_one_line_and_status_2():
    command = [sys.executable, str(SCRIPT), "--schedule", "interleaved", "--num_model_chunks", "2"]
    command += ["--pipeline_model_parallel_size", "4", "--num_microbatches", "6"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("ConfigError: 6 micro-batches cannot be interleaved over")
    assert ended.stderr.count("\n") == 1


def test_times_are_given_once_or_per_stage(main, capsys):
    main([*SIZES, "--forward_time", "1", "1", "1", "2", "--backward_time", "3", "--communication_time", "0.5"])
    stages = (StageCosts(1, 1.5, 1.5),) * 3 + (StageCosts(2, 1.5, 1.5),)
    assert capsys.readouterr().out == draw(one_f_one_b(4, 8), Costs(stages, 0.5)) + "\n"


def test_the_program_is_printed_as_actions_that_read_back(main, capsys):
    main([*SIZES, "--schedule", "interleaved", "--num_model_chunks", "2", "--format", "program"])
    rows = [line.split(":")[1].split() for line in capsys.readouterr().out.splitlines()]
    assert tuple(tuple(map(Action.parse, row)) for row in rows) == lower(interleaved(4, 8, 2)).ranks


def test_an_image_is_written_where_it_was_asked_for(main, tmp_path, capsys):
    path = tmp_path / "1f1b.png"
    main([*SIZES, "--format", "png", "--output", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"wrote {path}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--forward_time", "1", "2"], "--forward_time has 2 times, and there are 4 stages; give one time, or one per"),
        (["--backward_time", "0"], "--backward_time 0 is not a time that a stage can take; give a positive number"),
        (["--forward_time", "nan"], "--forward_time nan is not a time that a stage can take"),
        (["--communication_time", "-1"], "--communication_time -1 is not a time; give 0 or more"),
        (["--num_model_chunks", "2"], "--pipeline_schedule 1f1b holds one stage per pipeline rank"),
        (["--format", "png", "--output", "/nowhere/x.png"], "--output /nowhere/x.png cannot be written: No such file"),
        (["--schedule", "1f2b"], "--schedule 1f2b is not one of its choices"),
    ],
)
def test_values_that_cannot_be_drawn_are_refused(main, flags, message):
    with pytest.raises(ConfigError, match=message):
        main([*SIZES, *flags])


def test_help_shows_default_times_as_they_are_typed(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "one per stage; default: 1 --backward_time" in text
    assert "likewise, backward; default: 2 --communication_time" in text
