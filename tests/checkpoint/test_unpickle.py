"""Foreign files are read for their data alone: what they name is never imported, called or executed."""

from __future__ import annotations

import argparse
import enum
import io
import os
import pickle
import random
import re
import sys
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.checkpoint.unpickle import StandIn, StoredArray, read_torch_file
from megatron.errors import CheckpointError


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def attacks(canary: Path) -> dict[str, Any]:
    touch = f"touch {canary}"
    return {
        "os.system": Calls(os.system, touch),
        "exec": Calls(exec, f"open({str(canary)!r}, 'w')"),
        "eval": Calls(eval, f"open({str(canary)!r}, 'w')"),
        "open": Calls(open, str(canary), "w"),
        "import": Calls(__import__, "os"),
        "chain": Calls(getattr, Calls(__import__, "os"), "system"),
        "partial": Calls(__import__("functools").partial, os.system, touch),
        "apply": Calls(map, os.system, [touch]),
        "module of torch": Calls(torch.load, str(canary)),
        "inside a Namespace": argparse.Namespace(tensor=torch.zeros(2), hook=Calls(os.system, touch)),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_a_file_that_runs_a_program_is_refused_by_name_and_nothing_is_executed(tmp_path, zipped, suffix):
    canary = tmp_path / "canary"
    for kind, attack in attacks(canary).items():
        file = tmp_path / f"weights{suffix}"
        torch.save({"weight": torch.ones(2), "x": attack}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"names .*Nothing was executed; use a file of weights") as raised:
            read_torch_file(file)
        assert str(file) in str(raised.value), kind
        assert not canary.exists(), kind


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused_whatever_its_protocol(tmp_path, protocol):
    canary, file = tmp_path / "canary", tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Calls(os.system, f"touch {canary}"), protocol))
    with pytest.raises(CheckpointError, match=re.escape(f"{file} names {os.system.__module__}.system, which is no")):
        read_torch_file(file)
    assert not canary.exists()


def test_getattr_reaches_no_object_but_members_of_stand_ins(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"x": Calls(getattr, np.dtype("u4"), "__class__")}, file)
    with pytest.raises(CheckpointError, match="the attribute __class__ of"):
        read_torch_file(file)


def test_an_array_of_objects_is_not_built(tmp_path):
    """Its raw bytes could stand for addresses."""
    file = tmp_path / "weights.pt"
    torch.save({"x": np.array([None, 3], dtype=object)}, file)
    stored = read_torch_file(file)["x"]
    with pytest.raises(ValueError, match="which are no numbers"):
        _ = stored.array


def training_file(module_name: str) -> dict[str, Any]:
    """What Megatron-like programs save, with enums of a package that is not installed."""
    module = types.ModuleType(module_name)
    kind = enum.Enum("PositionEmbeddingType", {"rotary": 1, "absolute": 2}, module=module_name)
    module.PositionEmbeddingType = kind  # type: ignore[attr-defined]
    sys.modules[module_name] = module
    return {
        "args": argparse.Namespace(num_layers=2, lr=np.float64(0.25), params_dtype=torch.bfloat16, kind=kind.rotary),
        "model": {"weight": torch.arange(12.0).reshape(3, 4)[:, 1:], "half": torch.ones(2, dtype=torch.bfloat16)},
        "iteration": np.int64(7),
        "rng_state": [{"random": random.getstate(), "np": np.random.RandomState(3).get_state()}],
        "extra": io.BytesIO(b"abc"),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_training_programs_save_is_read_without_them(tmp_path, zipped):
    content, file = training_file("megatron.model.enums"), tmp_path / "model_optim_rng.pt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    del sys.modules["megatron.model.enums"]
    read = read_torch_file(file)
    assert "megatron.model.enums" not in sys.modules
    assert torch.equal(read["model"]["weight"], content["model"]["weight"])
    assert read["model"]["half"].dtype == torch.bfloat16
    args = read["args"]
    assert (args.num_layers, args.lr, args.params_dtype, read["iteration"]) == (2, 0.25, torch.bfloat16, 7)
    assert isinstance(args.kind, StandIn)
    assert args.kind.qualified_name == "megatron.model.enums.PositionEmbeddingType"
    assert args.kind.args in ((1,), ("rotary",))  # by value or by name, as the version of Python has it
    assert read["rng_state"][0]["random"] == random.getstate()
    state = read["rng_state"][0]["np"]
    assert isinstance(state[1], StoredArray)
    assert np.array_equal(state[1].array, np.random.RandomState(3).get_state()[1])


def test_a_member_of_an_enum_pickled_by_name_is_its_name(tmp_path):
    training_file("megatron.model.enums")
    kind = sys.modules.pop("megatron.model.enums").PositionEmbeddingType  # type: ignore[attr-defined]
    sys.modules["megatron.model.enums"] = types.SimpleNamespace(PositionEmbeddingType=kind)  # type: ignore[assignment]
    torch.save({"kind": Calls(getattr, kind, "rotary")}, tmp_path / "a.pt")
    del sys.modules["megatron.model.enums"]
    assert read_torch_file(tmp_path / "a.pt")["kind"].args == ("rotary",)


def test_reading_leaves_the_allow_list_of_the_process_as_it_was(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    read_torch_file(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_threads_read_at_once(tmp_path):
    torch.save({"args": argparse.Namespace(a=1), "kind": np.int64(3)}, tmp_path / "a.pt")
    with ThreadPoolExecutor(8) as pool:
        for read in pool.map(read_torch_file, [tmp_path / "a.pt"] * 64):
            assert (read["args"].a, read["kind"]) == (1, 3)


def test_tensors_of_a_zip_file_are_mapped_and_not_read(tmp_path):
    """What is written to the file behind the reader's back appears in the tensor, so that it is no copy."""
    file = tmp_path / "a.pt"
    torch.save({"x": torch.zeros(4096)}, file)
    tensor = read_torch_file(file)["x"]
    with zipfile.ZipFile(file) as archive:
        record = next(r for r in archive.infolist() if r.filename.endswith("data/0"))
    with file.open("r+b") as raw:
        raw.seek(record.header_offset + 26)  # the lengths of the name and of the padding that follow the header
        name_length, padding = int.from_bytes(raw.read(2), "little"), int.from_bytes(raw.read(2), "little")
        raw.seek(name_length + padding, os.SEEK_CUR)
        raw.write(np.ones(1024, dtype=np.float32).tobytes())
    assert tensor.sum() == 1024


def test_a_zip_file_that_was_packed_again_with_compression_is_read(tmp_path):
    torch.save({"x": torch.arange(500.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record), zipfile.ZIP_DEFLATED)
    assert torch.equal(read_torch_file(tmp_path / "b.pt")["x"], torch.arange(500.0))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_off_anywhere_is_named(tmp_path, zipped):
    file = tmp_path / "a.pt"
    torch.save({"args": argparse.Namespace(a=1), "x": torch.arange(64.0)}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for size in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=re.escape(f"{file} is damaged or no file of torch.save")):
            read_torch_file(file)


@pytest.mark.parametrize("content", [b'{"text": "It is a truth"}', b"\x80\x02garbage", b"It is a truth.\n" * 50])
def test_a_message_never_advises_to_execute_a_file(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged or no file of torch\.save \(.+\)\. Copy it again") as caught:
        read_torch_file(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_changed_byte_among_the_names_is_found_by_the_checksum(tmp_path):
    file = tmp_path / "a.pt"
    torch.save({"weight": torch.arange(4.0)}, file)
    file.write_bytes(file.read_bytes().replace(b"weight", b"weighs", 1))
    with pytest.raises(CheckpointError, match="is damaged .*CRC"):
        read_torch_file(file)


def test_no_file_at_all_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'a.pt'} cannot be read: No such file")):
        read_torch_file(tmp_path / "a.pt")
