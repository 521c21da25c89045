"""A run goes on from the newest checkpoint that is whole, on all ranks the same, and says what it skipped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from distributed import run_distributed
from finetune_runs import (
    Ending,
    assert_same_bits,
    command,
    finetune_runs,
    finetune_succeeds,
    stored_entries,
    write_tokens,
)
from megatron.checkpoint import CheckpointInfo, LocalTensor, RunState, save
from megatron.checkpoint.locate import TRACKER_FILE, iteration_folder
from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.checkpoint.native import NativeSource
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Region
from megatron.core.topology import Axis, Topology
from megatron.errors import CheckpointError
from megatron.training.restoring import _check_alike
from megatron.training.sinks import METRICS_FILE, read_metrics

FLAGS = {"train_iters": 6, "save_interval": 2, "eval_iters": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def losses(folder: Path) -> list[float | int | None]:
    return [line["lm_loss"] for line in read_metrics(folder / METRICS_FILE)]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def resumed(data: Path, whole: Path, run: Path, **flags: object) -> Ending:
    """Continues the run and checks that it ended as the one that never stopped; returns how rank 0 ended."""
    ((ending, _),) = finetune_runs(2, command(data, save=run, load=run, **{**FLAGS, **flags}))
    assert ending.status == 0, ending.err
    assert losses(run) == losses(whole)
    assert_same_bits(stored_entries(run), stored_entries(whole))
    return ending


@pytest.mark.parametrize("position", [-1, -5000], ids=["weights or moments at the end", "in the middle"])
def test_damage_in_the_data_that_one_rank_reads_takes_all_ranks_back_to_the_checkpoint_before(data, tmp_path, position):
    """The moments are damaged too late to be noticed when the folder is opened, and weights may be filled already."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    layout = {"pipeline_model_parallel_size": 2}
    finetune_succeeds(
        2, command(data, save=whole, **FLAGS, **layout), command(data, save=run, exit_interval=4, **FLAGS, **layout)
    )
    flip(iteration_folder(run, 4) / "rank_00001.safetensors", position)
    ending = resumed(data, whole, run, **layout)
    assert f"{run}: loading iteration 2, because of iteration 4: rank 1: " in ending.err
    assert "rank_00001.safetensors: the tile at rows " in ending.err and "does not have the checksum" in ending.err
    assert "iteration  3/6" in ending.out


def test_a_torn_manifest_and_a_garbage_tracker_are_no_obstacle(data, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    finetune_succeeds(2, command(data, save=whole, **FLAGS), command(data, save=run, exit_interval=4, **FLAGS))
    (run / TRACKER_FILE).write_bytes(b"\x00\xff")
    manifest = iteration_folder(run, 4) / MANIFEST_FILE
    manifest.write_bytes(manifest.read_bytes()[:-100])
    ending = resumed(data, whole, run)
    (warning,) = [line for line in ending.err.splitlines() if "loading iteration" in line]
    assert warning.startswith(f"{run}: loading iteration 2, because of the tracker: ")
    assert " | iteration 4: " in warning and "manifest.json is damaged" in warning


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error_on_all_ranks(data, tmp_path):
    finetune_succeeds(2, command(data, save=tmp_path, exit_interval=4, **FLAGS))
    folder = iteration_folder(tmp_path, 4)
    flip(folder / "rank_00001.safetensors", -1)
    flags = {**FLAGS, "save": False, "save_interval": False}
    named, by_path = finetune_runs(
        2, command(data, load=tmp_path, load_iters=4, **flags), command(data, load=folder, **flags)
    )
    for first, second in (named, by_path):
        assert (first.status, second.status) == (2, 2)
        assert "DamagedCheckpointError: " in first.err and "rank_00001.safetensors: the tile at rows " in first.err


def test_when_every_checkpoint_is_damaged_all_are_named(data, tmp_path):
    finetune_succeeds(1, command(data, save=tmp_path, exit_interval=4, **FLAGS))
    for iteration in (2, 4):
        flip(iteration_folder(tmp_path, iteration) / "rank_00000.safetensors", -1)
    ((ending,),) = finetune_runs(1, command(data, load=tmp_path, save=tmp_path, **FLAGS))
    assert ending.status == 2
    last = ending.err.splitlines()[-1]
    assert last.startswith(f"CheckpointError: {tmp_path} holds no checkpoint that can be loaded: iteration 4: ")
    assert " | iteration 2: " in last


def test_a_checkpoint_that_lacks_what_the_run_needs_is_not_passed_over(data, tmp_path):
    """It is whole: falling back would hide that the flags do not fit it."""
    finetune_succeeds(
        1,
        command(data, save=tmp_path, exit_interval=2, **FLAGS),
        command(data, save=tmp_path, load=tmp_path, exit_interval=4, no_save_optim=None, **FLAGS),
    )
    ((ending,),) = finetune_runs(1, command(data, load=tmp_path, save=tmp_path, **FLAGS))
    assert ending.status == 2 and "iter_0000004 was saved without the optimizer's state" in ending.err


def test_moments_of_a_load_that_failed_do_not_stay_where_the_older_checkpoint_has_none(data, tmp_path):
    """Iteration 0 is weights alone, as a converted model is; the damage is behind moments that are filled by then."""
    run, expected = tmp_path / "run", tmp_path / "expected"
    flags = {"train_iters": 2, "eval_iters": 0}
    finetune_succeeds(1, command(data, save=run, **flags))
    source = NativeSource(iteration_folder(run, 2))
    info = source.manifest.info
    save_again(source, run, dataclasses.replace(info, state=RunState(0)), kind="model.")
    save_again(source, run, info, kind="")
    flip(iteration_folder(run, 2) / "rank_00000.safetensors", -1)
    *_, continued = finetune_succeeds(
        1,
        command(data, load=iteration_folder(run, 0), save=expected, **flags),
        command(data, load=run, save=run, **flags),
    )
    assert "loading iteration 0, because of iteration 2: " in continued and " of optimizer.exp_avg_sq." in continued
    assert_same_bits(stored_entries(run), stored_entries(expected))


def save_again(source: NativeSource, root: Path, info: CheckpointInfo, kind: str) -> None:
    """The entries whose names begin with `kind`, with a checksum for every few numbers."""
    tensors = []
    for entry in source.names():
        if entry.startswith(kind):
            first, name = entry.split(".", 1)  # "optimizer" and "exp_avg.<name>" make the same entry
            shape = source.shape(entry)
            origin = (0,) * len(shape)
            region = Region(name, shape, origin, shape, origin)
            tensors.append(LocalTensor(first, [region], source.read(entry, origin, shape)))
    save(root, info, tensors, Axis("world"), tile_bytes=512)


class Opened:
    def __init__(self, path: Path):
        self.path = path


def message_of_ranks_that_see(names: list[str]) -> str:
    world = Topology.create(ParallelLayout(dp=len(names))).world
    try:
        _check_alike(Opened(Path("/run") / names[world.rank]), world)  # type: ignore[arg-type]
    except CheckpointError as error:
        return str(error)
    return "alike"


def test_processes_that_see_different_checkpoints_do_not_start() -> None:
    assert run_distributed(message_of_ranks_that_see, 2, ["iter_0000004"] * 2) == ["alike"] * 2
    assert (
        run_distributed(message_of_ranks_that_see, 2, ["iter_0000004", "iter_0000002"])
        == [
            "the processes see different checkpoints in /run: rank 0 iter_0000004, rank 1 iter_0000002; "
            "name one with --load_iters, or wait until all hosts see the same files."
        ]
        * 2
    )
