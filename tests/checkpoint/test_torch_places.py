"""A tensor that is found by its place in the file is the tensor that torch.load returns."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.torch_places import PlacedTensors
from megatron.errors import DamagedCheckpointError


def content() -> dict:
    whole = torch.arange(600.0).reshape(20, 30)
    return {
        "args": argparse.Namespace(layers=2),
        "whole": whole,
        "view": whole[3:9, 5:25:2].t(),
        "half": torch.randn(7, 3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(3, 5)),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "list": [torch.randn(2), {"deep": torch.arange(5, dtype=torch.uint8)}],
    }


def pairs(ours: dict, theirs: dict):
    names = ["whole", "view", "half", "parameter", "scalar"]
    yield from ((ours[name], theirs[name]) for name in names)
    yield ours["list"][0], theirs["list"][0]
    yield ours["list"][1]["deep"], theirs["list"][1]["deep"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_tensor_is_found(tmp_path: Path, zipped: bool) -> None:
    saved = content()
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    file = PlacedTensors(tmp_path / "a.pt")
    assert file.content["args"].layers == 2
    assert (file.content["whole"].device.type == "meta") == zipped
    for ours, theirs in pairs(file.content, saved):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(file.open(ours), theirs)


def packed_again(path: Path, compression: int, *, reverse: bool = False) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [records[0], *(reversed(records[1:]) if reverse else records[1:])]:
            archive.writestr(name, data)


@pytest.mark.parametrize("reverse", [False, True], ids=["same order", "another order"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "compressed"])
def test_a_file_packed_by_another_program_is_read_as_well(tmp_path: Path, compression: int, reverse: bool) -> None:
    """torch.load computes places as torch.save lays them out, which they are not then."""
    saved = content()
    torch.save(saved, tmp_path / "a.pt")
    packed_again(tmp_path / "a.pt", compression, reverse=reverse)
    file = PlacedTensors(tmp_path / "a.pt")
    for ours, theirs in pairs(file.content, saved):
        assert torch.equal(file.open(ours), theirs)


def test_a_place_that_is_none_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(4)}, tmp_path / "a.pt")
    file = PlacedTensors(tmp_path / "a.pt")
    stranger = torch.zeros(4, device="meta")
    with pytest.raises(
        DamagedCheckpointError, match="has no record of 16 bytes at byte None, where a tensor should be"
    ):
        file.open(stranger)


def test_a_flipped_bit_in_a_tensor_is_found_when_it_is_opened(tmp_path: Path) -> None:
    tensor = torch.arange(400_000.0)
    torch.save({"x": tensor, "y": torch.zeros(3)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "a.pt").write_bytes(content)
    file = PlacedTensors(tmp_path / "a.pt")
    assert torch.equal(file.open(file.content["y"]), torch.zeros(3))
    with pytest.raises(
        DamagedCheckpointError, match="a.pt holds other values in a/data/0 than were saved there: the ch"
    ):
        file.open(file.content["x"])


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.arange(9)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    file = PlacedTensors(tmp_path / "a.pt")
    assert torch.equal(file.open(file.content["x"]), torch.arange(9))
