"""Whatever is changed in a checkpoint of this project is found: every byte of every kind of file has a meaning."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from checkpoint_samples import save_from_one_process, tiles_of_bytes, whole_tensors
from hf_folders import save_llama
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.locate import TRACKER_FILE
from megatron.checkpoint.manifest import MANIFEST_FILE, read_manifest
from megatron.checkpoint.verify import Findings, folders_to_verify, verify_iteration, verify_source, verify_tracker
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError

LAYOUT = ParallelLayout(tp=2, pp=2)
NUM_FLIPS = 50


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_from_one_process(tmp_path_factory.mktemp("pristine"), LAYOUT)


@pytest.fixture
def folder(tmp_path: Path, pristine: Path) -> Path:
    shutil.copytree(pristine.parent, tmp_path / "run")
    return tmp_path / "run" / pristine.name


def verify(folder: Path) -> Findings:
    return verify_iteration(folder, on_bytes=lambda num_bytes: None)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00003.safetensors", MANIFEST_FILE])
def test_a_flipped_bit_anywhere_in_a_file_is_found_and_the_file_named(folder: Path, name: str) -> None:
    file, source = folder / name, random.Random(name)
    content = file.read_bytes()
    for _ in range(NUM_FLIPS):
        file.write_bytes(flipped(content, source.randrange(len(content)), source.randrange(8)))
        (message,) = verify(folder).damage
        assert str(file) in message
    file.write_bytes(content)
    assert verify(folder).damage == ()


def test_a_flipped_bit_in_the_tracker_is_found_or_names_an_iteration_that_is_there(folder: Path) -> None:
    tracker = folder.parent / TRACKER_FILE
    content = tracker.read_bytes()
    shutil.copytree(folder, folder.with_name("iter_0000011"))
    for position in range(len(content)):
        for bit in range(8):
            tracker.write_bytes(flipped(content, position, bit))
            found = verify_tracker(folder.parent)
            # "11" is a whole checkpoint, and the only one besides "10" that a bit can lead to.
            assert bool(found.damage) == (tracker.read_bytes() != b"11")
            assert all(str(tracker) in message for message in found.damage)


def test_where_the_tracker_is_garbage_the_newest_iteration_is_verified_besides(folder: Path) -> None:
    shutil.copytree(folder, later := folder.with_name("iter_0000011"))
    (folder.parent / TRACKER_FILE).write_text("banana")
    assert folders_to_verify(folder.parent) == [later]
    assert verify_tracker(folder.parent).damage
    with pytest.raises(CheckpointError, match="--load_iters asks for iteration 12"):
        folders_to_verify(folder.parent, 12)


def test_an_iteration_under_another_ones_name_is_remarked_on(folder: Path) -> None:
    assert verify(folder).remarks == ()
    folder.rename(renamed := folder.with_name("iter_0000011"))
    found = verify(renamed)
    assert (found.damage, found.remarks) == ((), (f"{renamed} holds iteration 10: it was copied or renamed",))


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
@pytest.mark.parametrize("name", ["rank_00001.safetensors", MANIFEST_FILE])
def test_a_file_that_was_cut_off_is_found(folder: Path, name: str, num_bytes: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes])
    (message,) = verify(folder).damage
    assert str(folder / name) in message


def test_bytes_after_the_end_are_found(folder: Path) -> None:
    for name in ("rank_00001.safetensors", MANIFEST_FILE):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b"\n")
        assert str(folder / name) in verify(folder).damage[0]
        (folder / name).write_bytes(content)


def test_shards_that_changed_places_are_both_found(folder: Path) -> None:
    first, second = folder / "rank_00000.safetensors", folder / "rank_00001.safetensors"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    damage = verify(folder).damage
    assert [str(first) in message or str(second) in message for message in damage] == [True] * len(damage)
    assert any(str(first) in message for message in damage) and any(str(second) in message for message in damage)


def tiles_in(folder: Path, name: str, first: int, end: int) -> int:
    """How many tiles have bytes between these of a file."""
    record = read_manifest(folder).files[name]
    return len(set(tiles_of_bytes(folder, name, record)[first - record.header_bytes : end - record.header_bytes]))


def test_a_zeroed_page_is_found_in_every_tile_it_covers(folder: Path) -> None:
    file = folder / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    page = len(content) // 8192 * 4096
    content[page : page + 4096] = bytes(4096)
    file.write_bytes(content)
    damage = verify(folder).damage
    assert len(set(damage)) == len(damage) == tiles_in(folder, file.name, page, page + 4096)
    assert all(str(file) in message for message in damage)


def test_a_shard_of_another_checkpoint_is_found(tmp_path: Path, folder: Path) -> None:
    """The same layout and shapes, other values: header and size agree, no tile does."""
    other = save_from_one_process(tmp_path / "other", LAYOUT)
    name = "rank_00002.safetensors"
    content = bytearray((other / name).read_bytes())
    start = len(content) - 8 * 512
    content[start:] = bytes(byte ^ 1 for byte in content[start:])
    (folder / name).write_bytes(content)
    assert len(verify(folder).damage) == tiles_in(folder, name, start, len(content))


def test_every_missing_file_is_named_and_a_foreign_one_is_remarked_on(folder: Path) -> None:
    for rank in (0, 3):
        (folder / f"rank_{rank:05d}.safetensors").unlink()
    (folder / "notes.txt").touch()
    found = verify(folder)
    assert [f"rank_{rank:05d}.safetensors cannot be opened" in m for rank, m in zip((0, 3), found.damage, strict=True)]
    assert found.remarks == (f"{folder / 'notes.txt'} is not part of the checkpoint",)


def test_all_bytes_are_reported_for_any_number_of_workers(folder: Path) -> None:
    expected = sum(tensor.nbytes for tensor in whole_tensors().values())
    for num_workers in (1, 3):
        reported: list[int] = []
        verify_iteration(folder, num_workers=num_workers, on_bytes=reported.append)
        assert sum(reported) == expected


def test_a_shard_of_a_hugging_face_model_that_loses_its_end_later_is_named(tmp_path: Path) -> None:
    source = HuggingFaceSource(save_llama(tmp_path / "hf"))
    assert verify_source(source, on_bytes=lambda num_bytes: None).damage == ()
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    damage = verify_source(source, on_bytes=lambda num_bytes: None).damage
    assert damage and all(str(file) in message for message in damage)
