"""Without a named iteration the newest valid checkpoint is opened, and what was skipped is said; a named one is taken
or refused."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint_samples import INFO, save_from_one_process
from megatron.checkpoint.locate import TRACKER_FILE, iteration_folder, replaced_folder
from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.validity import newest_valid
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError, DamagedCheckpointError

SHARD = "rank_00001.safetensors"


def save(root: Path, *iterations: int) -> None:
    for iteration in iterations:
        info = dataclasses.replace(INFO, state=dataclasses.replace(INFO.state, iteration=iteration))
        save_from_one_process(root, ParallelLayout(tp=2), info=info)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, position: int, bit: int = 8) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


# What can happen to a checkpoint, and what the warning says of it.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest missing": (lambda folder: (folder / MANIFEST_FILE).unlink(), "manifest.json does not exist"),
    "manifest torn": (lambda folder: cut(folder / MANIFEST_FILE), "manifest.json is damaged"),
    "manifest empty": (lambda folder: (folder / MANIFEST_FILE).write_bytes(b""), "manifest.json is damaged"),
    "manifest edited": (lambda folder: flip(folder / MANIFEST_FILE, 300), "manifest.json is damaged"),
    "shard missing": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} cannot be opened"),
    "shard cut": (lambda folder: cut(folder / SHARD), "it was cut off"),
    "shard header": (lambda folder: flip(folder / SHARD, 30), f"{SHARD}: the header"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_latest_is_skipped_with_a_warning_and_named_explicitly_it_is_an_error(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10, 20)
    harm, said = DAMAGES[damage]
    harm(iteration_folder(tmp_path, 20))
    source = open_source(tmp_path)
    assert source.path == iteration_folder(tmp_path, 10)
    (warning,) = caplog.messages
    assert f"{tmp_path}: loading iteration 10, because of iteration 20: " in warning and said in warning
    with pytest.raises(CheckpointError, match="iter_0000020"):
        open_source(tmp_path, 20)
    if damage != "manifest missing":  # without one the folder is not recognised
        with pytest.raises(DamagedCheckpointError, match="iter_0000020"):
            open_source(iteration_folder(tmp_path, 20))


def test_what_is_whole_is_opened_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10, 20)
    assert open_source(tmp_path).path == iteration_folder(tmp_path, 20)
    assert open_source(tmp_path, 10).path == iteration_folder(tmp_path, 10)
    assert caplog.messages == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"12 13", b"-3", b"9" * 4000, None], ids=lambda c: repr(c)[:12])
def test_without_a_tracker_that_can_be_read_the_newest_is_taken(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10, 20)
    tracker = tmp_path / TRACKER_FILE
    tracker.unlink() if content is None else tracker.write_bytes(content)
    assert open_source(tmp_path).path == iteration_folder(tmp_path, 20)
    (warning,) = caplog.messages
    assert "loading iteration 20, because of the tracker: " in warning
    assert ("cannot be read (No such file" if content is None else "which is not an iteration") in warning


@pytest.mark.parametrize("bit", range(16))
def test_any_bit_of_the_tracker_may_flip(tmp_path: Path, bit: int, caplog: pytest.LogCaptureFixture) -> None:
    """Of the two bytes of "20": what comes out is no number, or none of an iteration that is there."""
    save(tmp_path, 10, 20)
    flip(tmp_path / TRACKER_FILE, bit // 8, bit=1 << bit % 8)
    assert open_source(tmp_path).path == iteration_folder(tmp_path, 20)
    (warning,) = caplog.messages
    assert "loading iteration 20, because of " in warning


def test_a_tracker_that_names_nothing_there_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    (tmp_path / TRACKER_FILE).write_text("30")
    assert open_source(tmp_path).path == iteration_folder(tmp_path, 10)
    assert "because of iteration 30: iter_0000030/manifest.json does not exist" in caplog.messages[0]


def test_a_run_that_went_back_falls_back_before_the_point_where_it_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved 10 to 40, continued from 10 and saved 20 again: 30 and 40 are of the run that was given up."""
    save(tmp_path, 10, 20, 30, 40, 20)
    assert open_source(tmp_path).path == iteration_folder(tmp_path, 20)
    (warning,) = caplog.messages
    assert "loading iteration 20, which the tracker names, though there are later ones (up to 40)" in warning
    cut(iteration_folder(tmp_path, 20) / SHARD)
    assert open_source(tmp_path).path == iteration_folder(tmp_path, 10)
    cut(iteration_folder(tmp_path, 10) / SHARD)
    assert open_source(tmp_path).path == iteration_folder(tmp_path, 40)


def test_an_iteration_that_was_set_aside_counts(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    aside = replaced_folder(iteration_folder(tmp_path, 20))
    iteration_folder(tmp_path, 20).rename(aside)
    assert open_source(tmp_path).path == aside


def test_when_nothing_is_left_all_that_was_tried_is_named(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    (tmp_path / TRACKER_FILE).write_text("many")
    cut(iteration_folder(tmp_path, 20) / SHARD)
    (iteration_folder(tmp_path, 10) / MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError) as error:
        open_source(tmp_path)
    for part in ("holds no checkpoint that can be loaded: the tracker: ", "| iteration 20: ", "| iteration 10: "):
        assert part in str(error.value)
    assert "Restore the files, or start anew in another folder." in str(error.value)


def test_what_was_found_damaged_while_reading_is_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10, 20)
    damaged = {iteration_folder(tmp_path, 20): "tile 3 is not what was written."}
    assert newest_valid(tmp_path, damaged).path == iteration_folder(tmp_path, 10)
    assert caplog.record_tuples[0][1] == logging.WARNING
    assert "iteration 20: tile 3 is not what was written." in caplog.messages[0]


def test_a_checkpoint_of_a_newer_program_is_not_passed_over(tmp_path: Path) -> None:
    """It is whole; an older one in its place would be training lost."""
    save(tmp_path, 10, 20)
    manifest = iteration_folder(tmp_path, 20) / MANIFEST_FILE
    body = manifest.read_text().partition("\n")[2].replace('"format_version": 2', '"format_version": 3')
    manifest.write_text(f'{{"crc32": "{zlib.crc32(body.encode()):08x}",\n{body}')
    with pytest.raises(CheckpointError, match="has format version 3"):
        open_source(tmp_path)
