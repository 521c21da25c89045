"""Files with block checksums: the safetensors library reads them, slices are exact, and no wrong byte is returned."""

from __future__ import annotations

import errno
import os
import random
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.storage import OutgoingPiece, WrittenFile, write_file
from megatron.checkpoint.verified_file import VerifiedFile
from megatron.errors import CheckpointError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def piece(name: str, tensor: torch.Tensor) -> OutgoingPiece:
    shape = tuple(tensor.shape)
    return OutgoingPiece(name, shape, tensor.dtype, Rectangle.whole(shape), lambda: tensor)


def write(path: Path, tensors: dict[str, torch.Tensor], block_bytes: int = 64) -> WrittenFile:
    return write_file(path, [piece(name, tensor) for name, tensor in tensors.items()], block_bytes=block_bytes)


def reader(path: Path, written: WrittenFile) -> VerifiedFile:
    return VerifiedFile(path.parent, written.name, written.record)


def read_all(path: Path, written: WrittenFile) -> None:
    file = reader(path, written)
    for w in written.pieces:
        file.read(w.piece.key, Rectangle.whole(w.shape), torch.empty(w.shape, dtype=w.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "scalar": torch.tensor(3).to(dtype),
        "empty": torch.zeros((0, 4), dtype=dtype),
        "matrix": torch.arange(35).reshape(5, 7).to(dtype),
        "transposed": torch.arange(35).reshape(5, 7).t().to(dtype),
        "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }
    path = tmp_path / "a.safetensors"
    written = write(path, tensors)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].dtype == t.dtype and torch.equal(loaded[name], t) for name, t in tensors.items())
    read_all(path, written)


def test_a_part_of_an_entry_says_in_its_key_which_part_it_is(tmp_path: Path) -> None:
    part = OutgoingPiece("w", (4, 6), torch.float32, Rectangle((2, 0), (2, 6)), lambda: torch.ones(2, 6))
    write_file(tmp_path / "a.safetensors", [part])
    assert list(load_file(tmp_path / "a.safetensors")) == ["w[2:4, 0:6]"]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    block_bytes=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.uint8)),
)
def test_every_rectangle_read_is_the_slice_of_the_tensor(tmp_path_factory, shape, block_bytes, seed, dtype) -> None:
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    source = random.Random(seed)
    tensor = torch.randint(0, 100, shape).to(dtype)
    written = write(path, {"before": torch.arange(source.randrange(20)), "x": tensor, "y": tensor}, block_bytes)
    file = reader(path, written)
    for _ in range(5):
        start = tuple(source.randrange(n) for n in shape)
        size = tuple(source.randint(1, n - a) for a, n in zip(start, shape, strict=True))
        out = torch.empty(size, dtype=dtype)
        file.read("x", Rectangle(start, size), out)
        assert torch.equal(out, tensor[Rectangle(start, size).slices_in(Rectangle.whole(shape))])


def test_a_slice_reads_only_the_blocks_that_cover_it(tmp_path: Path) -> None:
    """The rows asked for are read although the rest of the file is destroyed, and only then."""
    path = tmp_path / "a.safetensors"
    tensor = torch.arange(256.0).reshape(16, 16)  # a row is one block of 64 bytes
    written = write(path, {"x": tensor})
    with open(path, "r+b") as file:
        for row in (0, 1, 2, 7, 15):
            file.seek(written.record.header_bytes + row * 64)
            file.write(b"\xff" * 64)
    out = torch.empty(4, 16)
    reader(path, written).read("x", Rectangle((3, 0), (4, 16)), out)
    assert torch.equal(out, tensor[3:7])
    with pytest.raises(CheckpointError, match="block 7 "):
        reader(path, written).read("x", Rectangle((3, 2), (5, 3)), torch.empty(5, 3))


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = write(path, {"model.norm": torch.arange(20.0), "model.w": torch.arange(30.0).reshape(5, 6)})
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"a\.safetensors.*(header|block \d+)"):
            read_all(path, written)


def test_the_message_of_a_damaged_block_names_file_block_position_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = write(path, {"model.a": torch.arange(20.0), "model.b": torch.arange(30.0), "model.c": torch.arange(64.0)})
    content = bytearray(path.read_bytes())
    first = written.record.header_bytes + 64  # block 1 holds bytes 64 to 128: a ends at 80
    content[first] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_all(path, written)
    assert str(path) in str(error.value)
    assert f"block 1 (bytes {first} to {first + 64})" in str(error.value)
    assert "damaged: model.a, model.b." in str(error.value)


@pytest.mark.parametrize("length", [0, 5, -1])
def test_a_file_that_was_cut_off_is_found_when_it_is_opened(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    written = write(path, {"x": torch.arange(20.0)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=f"should have {written.record.num_bytes}: it was cut off"):
        reader(path, written)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    written = write(tmp_path / "a.safetensors", {"x": torch.arange(20.0)})
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be opened \(No such file or directory\)"):
        reader(tmp_path / "a.safetensors", written)


def test_space_is_reserved_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device \(0\.000 GiB needed\)"):
        write(tmp_path / "a.safetensors", {"x": torch.arange(20.0)})
    assert (tmp_path / "a.safetensors").stat().st_size == 0


def test_a_file_system_that_cannot_reserve_is_written_all_the_same(tmp_path: Path, monkeypatch) -> None:
    def unsupported(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    read_all(tmp_path / "a.safetensors", write(tmp_path / "a.safetensors", {"x": torch.arange(20.0)}))


def test_chunks_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    """When a chunk is made the one before the last is gone: memory stays at two chunks, however many there are."""
    previous: list[weakref.ref[torch.Tensor]] = []

    def chunks() -> Iterator[torch.Tensor]:
        for _ in range(4):
            assert sum(chunk() is not None for chunk in previous) <= 1
            chunk = torch.ones(16, 8)
            previous.append(weakref.ref(chunk))
            yield chunk
            del chunk

    pieces = [OutgoingPiece(f"w{i}", (64, 8), torch.float32, Rectangle.whole((64, 8)), chunks) for i in range(5)]
    write_file(tmp_path / "a.safetensors", pieces, block_bytes=128)
    assert len(previous) == 20
