"""Trees of torch.distributed.checkpoint are read back bit for bit, whoever held which part; damage is found."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from dcp_trees import copied, edit_metadata, placed_tensors, save_placed, save_tree
from distributed import run_distributed
from megatron.checkpoint.dcp_tensors import DcpTensors
from megatron.errors import CheckpointError, DamagedCheckpointError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def whole(tensors, name):
    shape = tensors.shape(name)
    return tensors.read(name, (0,) * len(shape), shape)


def state():
    torch.manual_seed(1)
    return {
        "model": {
            **{str(dtype): torch.randn(5, 7).to(dtype) for dtype in DTYPES},
            **{str(dtype): (3 * torch.randn(5, 7)).to(dtype) for dtype in INTEGERS},
            "transposed": torch.randn(6, 4).t(),
            "part": torch.randn(10, 8)[2:5, 1:7],
            "scalar": torch.tensor(2.5),
            "line": torch.randn(11),
            "cube": torch.randn(3, 4, 5),
            "none": torch.empty(0, 4),
        },
        "lr": 0.1,
    }


@pytest.fixture
def folder(tmp_path):
    return save_tree(tmp_path / "tree", {"a": torch.arange(4000.0).view(50, 80), "b": torch.ones(3), "c": {"n": 5}})


def test_every_dtype_and_shape_is_read_back_bit_for_bit(tmp_path):
    tensors = DcpTensors(save_tree(tmp_path, state()))
    expected = {f"model.{name}": tensor for name, tensor in state()["model"].items()}
    assert set(tensors.names()) == expected.keys()
    for name, tensor in expected.items():
        assert (tensors.shape(name), tensors.dtype(name)) == (tensor.shape, tensor.dtype)
        read = whole(tensors, name)
        assert torch.equal(read, tensor) and read.is_contiguous(), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_parts_of_ranks_in_every_placement_are_put_together_slices_too(world_size, tmp_path):
    run_distributed(save_placed, world_size, tmp_path, world_size)
    tensors = DcpTensors(tmp_path)
    assert len(list(tmp_path.glob("*.distcp"))) == world_size
    for name, tensor in placed_tensors().items():
        assert torch.equal(whole(tensors, name), tensor), name
        first, size = (tensor.shape[0] // 2, 1), (tensor.shape[0] - tensor.shape[0] // 2, 3)
        expected = tensor[first[0] :, 1:4]
        assert torch.equal(tensors.read(name, first, size), expected), name


def test_a_slice_is_the_slice_of_the_whole(folder):
    tensors, expected = DcpTensors(folder), torch.arange(4000.0).view(50, 80)
    for (row, column), (rows, columns) in [
        ((0, 0), (50, 80)),
        ((3, 79), (47, 1)),
        ((49, 5), (1, 70)),
        ((7, 7), (2, 3)),
    ]:
        part = tensors.read("a", (row, column), (rows, columns))
        assert torch.equal(part, expected[row : row + rows, column : column + columns])
        assert part.untyped_storage().nbytes() == 4 * rows * columns


def test_bits_that_changed_are_found_when_a_tensor_is_read_in_order(folder):
    file = next(folder.glob("*.distcp"))
    content = file.read_bytes()
    first = content.index(torch.arange(4000.0).numpy().tobytes())
    for bit in range(0, 16000 * 8, 4001):
        damaged = bytearray(content)
        damaged[first + bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        tensors = DcpTensors(folder)
        with pytest.raises(DamagedCheckpointError, match=r"distcp: what lies at byte .* does not have its checksum"):
            for row in range(0, 50, 10):
                tensors.read("a", (row, 0), (10, 80))


def test_files_without_checksums_are_read(tmp_path):
    """torch.save can be told to compute none, for speed."""
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        folder = save_tree(tmp_path, {"a": torch.arange(6.0)})
    finally:
        torch.serialization.set_crc32_options(computes)
    assert torch.equal(whole(DcpTensors(folder), "a"), torch.arange(6.0))


def test_bits_that_changed_anywhere_else_are_named_or_do_no_harm(folder):
    """In the records around the numbers, and in .metadata."""
    expected = torch.arange(4000.0).view(50, 80)
    found = 0
    for file in (next(folder.glob("*.distcp")), folder / ".metadata"):
        content = file.read_bytes()
        data = content.find(expected.numpy().tobytes())
        places = [p for p in range(0, len(content), 37) if not data <= p < data + expected.nbytes or data < 0]
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            try:
                tensors = DcpTensors(folder)
                if "a" in tensors.names():  # a name is as good as another to a reader that is not told what to expect
                    assert torch.equal(whole(tensors, "a"), expected)
            except CheckpointError as error:
                assert str(folder) in str(error)
                found += 1
        file.write_bytes(content)
    assert found > 20


def test_a_missing_and_a_short_file_are_named(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=r"__0_0.distcp has \d+ bytes and .metadata says at least \d+"):
        DcpTensors(folder)
    file.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"__0_0.distcp is missing, but .metadata lists it"):
        DcpTensors(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r".metadata cannot be read"):
        DcpTensors(folder)


def test_metadata_cut_off_anywhere_is_named(folder):
    content = (folder / ".metadata").read_bytes()
    for length in range(0, len(content), 50):
        (folder / ".metadata").write_bytes(content[:length])
        with pytest.raises(DamagedCheckpointError, match=r".metadata is damaged: it holds no whole pickle"):
            DcpTensors(folder)


def test_gaps_and_overlaps_between_chunks_are_named(folder):
    def halved(metadata, offset):
        stored = metadata.state_dict_metadata["a"]
        upper = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((25, 80)))
        lower = ChunkStorageMetadata(torch.Size((offset, 0)), torch.Size((50 - offset, 80)))
        stored.chunks = [upper, lower]
        place = next(place for place in metadata.storage_data if place.fqn == "a")
        metadata.storage_data[type(place)("a", (offset, 0), 1)] = metadata.storage_data[place]

    content = (folder / ".metadata").read_bytes()
    edit_metadata(folder, lambda metadata: halved(metadata, 30))
    with pytest.raises(DamagedCheckpointError, match="a is not whole: 400 of its 4000 elements are in no piece"):
        DcpTensors(folder)
    (folder / ".metadata").write_bytes(content)
    edit_metadata(folder, lambda metadata: halved(metadata, 20))
    with pytest.raises(DamagedCheckpointError, match=r"a is not whole: the pieces .* overlap"):
        DcpTensors(folder)


def test_a_chunk_of_another_tensor_is_named(folder):
    def swap(metadata):
        places = {place.fqn: place for place in metadata.storage_data}
        a, b = metadata.storage_data[places["a"]], metadata.storage_data[places["b"]]
        metadata.storage_data |= {places["a"]: b, places["b"]: a}

    edit_metadata(folder, swap)
    with pytest.raises(
        DamagedCheckpointError, match=r"b has shape \[50, 80\] and torch.float32 at byte \d+, not \[3\]"
    ):
        whole(DcpTensors(folder), "b")


def _edit_info(folder, **changes):
    def edit(metadata):
        for place, info in metadata.storage_data.items():
            if place.fqn == "a":
                metadata.storage_data[place] = copied(info, **changes)

    edit_metadata(folder, edit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_path": "../secret"}, r"a lies in ../secret, outside of the checkpoint's folder"),
        ({"transform_descriptors": ["zstd"]}, r"a was stored through zstd, which is not supported"),
        ({"offset": -5}, r"is no metadata of torch.distributed.checkpoint \(ValueError: \(-5, \d+\) are no sizes"),
        ({"offset": 100}, r"__0_0.distcp: a at byte 100 is no tensor"),
        ({"relative_path": 3}, "is no metadata of torch.distributed.checkpoint"),
    ],
)
def test_a_place_that_cannot_be_is_named(folder, changes, message):
    _edit_info(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        whole(DcpTensors(folder), "a")


def test_a_pickle_of_something_else_is_named(folder):
    edit_metadata(folder, lambda _: {"weights": 3})
    with pytest.raises(DamagedCheckpointError, match="is no metadata of torch.distributed.checkpoint"):
        DcpTensors(folder)


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """The pickler wants a function that it can call; what is called is decided by the reader."""


def _attacks(canary: Path):
    touch = f"touch {canary}"
    return {
        "system": Calls(os.system, touch),
        "eval": Calls(eval, f"open({str(canary)!r}, 'w')"),
        "open": Calls(open, str(canary), "w"),
        "import": Calls(__import__, "os"),
        "torch.load": Calls(torch.load, str(canary)),
        "getattr": Calls(Calls(getattr, Calls(__import__, "os"), "system"), touch),
        "partial": Calls(__import__("functools").partial, os.system, touch),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_metadata_that_would_run_a_program_is_refused_by_name_and_nothing_runs(folder, tmp_path, protocol):
    canary = tmp_path / "canary"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for attack in _attacks(canary).values():
        for place in ({"planner_data": attack}, {"state_dict_metadata": {"a": attack}}, {"storage_data": attack}):
            (folder / ".metadata").write_bytes(pickle.dumps(copied(metadata, **place), protocol))
            with pytest.raises(
                CheckpointError, match=r"names .*, which is no part of a checkpoint.*Nothing was executed"
            ):
                DcpTensors(folder)
    assert not canary.exists()


def test_stand_ins_are_not_called_through_getattr_and_do_not_outlive_their_file(folder):
    """A pickle may set attributes of the classes it names: those of this file alone."""
    evil = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x0e\x00\x00\x00qualified_nameX\x04\x00\x00\x00evils"
        b"\x86b."
    )
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(evil)
    with pytest.raises(CheckpointError):
        DcpTensors(folder)
    (folder / ".metadata").write_bytes(content)
    assert "a" in DcpTensors(folder).names()


def test_a_stream_that_would_run_a_program_is_refused_by_name_and_nothing_runs(folder, tmp_path):
    canary = tmp_path / "canary"
    file = next(folder.glob("*.distcp"))
    for attack in _attacks(canary).values():
        torch.save(attack, file)
        _edit_info(folder, offset=0, length=file.stat().st_size)
        with warnings.catch_warnings(), file.open("ab") as padded:
            padded.write(bytes(20000))
        with pytest.raises(CheckpointError, match=r"distcp names .*Nothing was executed"):
            whole(DcpTensors(folder), "a")
    assert not canary.exists()


def test_ranks_files_may_be_moved_together(folder, tmp_path):
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert torch.equal(whole(DcpTensors(Path(moved)), "b"), torch.ones(3))
