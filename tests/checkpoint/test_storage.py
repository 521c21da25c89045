"""Files with checksums of tiles: the safetensors library reads them, slices are exact, no wrong byte is returned."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import re
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint_samples import tiles_of_bytes
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.storage import OutgoingPiece, WrittenFile, write_file
from megatron.checkpoint.tiles import Tiles
from megatron.checkpoint.verified_file import VerifiedFile
from megatron.core.sharding import Cut
from megatron.errors import CheckpointError, DamagedCheckpointError

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


CUTS = (None, Cut(0), Cut(0, is_even=False), Cut(1))


def piece(name: str, tensor: torch.Tensor, cut: Cut | None = None) -> OutgoingPiece:
    """`cut` is None where the tensor does not have that dimension."""
    shape, cut = tuple(tensor.shape), None if cut is None or cut.dim >= tensor.dim() else cut
    return OutgoingPiece(name, shape, tensor.dtype, Rectangle.whole(shape), cut, lambda: tensor)


def write(path: Path, tensors: dict[str, torch.Tensor], cut: Cut | None = None, tile_bytes: int = 64) -> WrittenFile:
    return write_file(path, [piece(name, tensor, cut) for name, tensor in tensors.items()], tile_bytes=tile_bytes)


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
    part = OutgoingPiece("w", (4, 6), torch.float32, Rectangle((2, 0), (2, 6)), None, lambda: torch.ones(2, 6))
    write_file(tmp_path / "a.safetensors", [part])
    assert list(load_file(tmp_path / "a.safetensors")) == ["w[2:4, 0:6]"]


def rectangles(shape: tuple[int, ...], source: random.Random) -> Rectangle:
    start = tuple(source.randrange(n) for n in shape)
    return Rectangle(start, tuple(source.randint(1, n - a) for a, n in zip(start, shape, strict=True)))


@settings(max_examples=120)
@given(
    shape=st.lists(st.integers(1, 24), max_size=4).map(tuple),
    tile_bytes=st.integers(1, 400),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    cut=st.sampled_from(CUTS),
)
def test_every_rectangle_read_is_the_slice_of_the_tensor(tmp_path_factory, shape, tile_bytes, seed, dtype, cut) -> None:
    """Into a new tensor, and into a rectangle of a larger one."""
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    source = random.Random(seed)
    tensor = torch.randint(0, 100, shape).to(dtype)
    written = write(path, {"before": torch.arange(source.randrange(20)), "x": tensor, "y": tensor}, cut, tile_bytes)
    file = reader(path, written)
    for _ in range(5):
        wanted = rectangles(shape, source)
        expected = tensor[wanted.slices_in(Rectangle.whole(shape))]
        out = torch.empty(wanted.size, dtype=dtype)
        file.read("x", wanted, out)
        assert torch.equal(out, expected)
        larger = torch.zeros(shape, dtype=dtype)
        file.read("x", wanted, larger[wanted.slices_in(Rectangle.whole(shape))])
        assert torch.equal(larger[wanted.slices_in(Rectangle.whole(shape))], expected)
        assert larger.count_nonzero() == expected.count_nonzero()


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_wrong_byte_is_found_by_looking_for_damage_and_by_every_read_that_touches_its_tile(
    tmp_path: Path, cut: Cut | None
) -> None:
    """And by no other read: what a rank does not ask for may be as it likes."""
    path, source = tmp_path / "a.safetensors", random.Random(str(cut))
    written = write(path, {"x": torch.arange(12.0 * 16).reshape(12, 16), "y": torch.arange(7.0)[:, None]}, cut, 256)
    content, tiles = path.read_bytes(), tiles_of_bytes(tmp_path, path.name, written.record)
    assert len(set(tiles)) == {None: 4, Cut(0): 5, Cut(0, is_even=False): 4, Cut(1): 25}[cut]
    for position in range(0, len(tiles), 3):
        at = written.record.header_bytes + position
        path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
        key, group, strip = tiles[position]
        grid = written.record.tiles[key]
        (message,) = reader(path, written).damage(on_bytes=lambda num_bytes: None)
        assert str(path) in message and f" rows {group * grid.rows} to " in message and f" of {key} (bytes " in message
        assert f", columns {strip * grid.columns // 4} to " in message
        first, end = map(int, re.findall(r"bytes (\d+) to (\d+)", message)[0])
        assert first <= at < end
        wanted = rectangles((12, 16), source)
        rows = range(wanted.start[0] // grid.rows, (wanted.start[0] + wanted.size[0] - 1) // grid.rows + 1)
        strips = range(
            wanted.start[1] * 4 // grid.columns, ((wanted.start[1] + wanted.size[1]) * 4 - 1) // grid.columns + 1
        )
        try:
            reader(path, written).read("x", wanted, torch.empty(wanted.size))
            is_found = False
        except DamagedCheckpointError as error:
            assert str(error).startswith(message.removesuffix("."))
            is_found = True
        assert is_found == (key == "x" and group in rows and strip in strips)


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    tile_bytes=st.integers(1, 300),
    cut=st.sampled_from(CUTS),
    data=st.data(),
)
def test_the_checksums_do_not_depend_on_how_rows_were_portioned_out(tmp_path_factory, shape, tile_bytes, cut, data):
    """They are those of the tiles' bytes, row after row."""
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    tensor = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    ends = sorted(data.draw(st.sets(st.integers(1, shape[0]))) | {shape[0]})
    portions = [tensor[first:end] for first, end in zip([0, *ends], ends, strict=False)]
    planned = dataclasses.replace(piece("x", tensor, cut), read=lambda: iter(portions))
    tiles = write_file(path, [planned], tile_bytes=tile_bytes).record.tiles["x"]
    matrix = tensor.reshape(shape[0], -1).view(torch.uint8)
    expected = [
        zlib.crc32(bytes(strip.flatten().tolist()))
        for group in matrix.split(tiles.rows)
        for strip in group.split(tiles.columns, dim=1)
    ]
    assert [tiles.checksum(number) for number in range(tiles.num_checksums)] == expected


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = write(path, {"model.norm": torch.arange(20.0), "model.w": torch.arange(30.0).reshape(5, 6)})
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"a\.safetensors: the (header|tile at rows \d+)"):
            read_all(path, written)


def test_the_message_of_a_damaged_tile_names_file_place_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    pieces = [piece("model.a", torch.arange(20.0)), piece("model.b", torch.arange(96.0).reshape(6, 16), Cut(1))]
    written = write_file(path, pieces, tile_bytes=64)
    content = bytearray(path.read_bytes())
    first = written.record.header_bytes + 80 + 3 * 64 + 40  # row 3 of b is one group; its strips have 8 bytes
    content[first] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_all(path, written)
    assert str(error.value) == (
        f"{path}: the tile at rows 3 to 4, columns 10 to 12 of model.b (bytes {first} to {first + 8}) does not have "
        "the checksum in the manifest. Restore the file or load another iteration with --load_iters."
    )


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ({}, "the manifest does not have a checksum for every tile of x"),
        ({"x": Tiles(16, 4, bytes(4))}, "the manifest does not have a checksum for every tile of x"),
        ({"x": Tiles(0, 4, bytes(8))}, "the manifest does not have a checksum for every tile of x"),
        ({"x": Tiles(16, -4, bytes(8))}, "the manifest does not have a checksum for every tile of x"),
        ({"x": Tiles(16, 4, bytes(9))}, "the manifest does not have a checksum for every tile of x"),
        ({"x": Tiles(16, 4, bytes(8)), "y": Tiles(1, 4, bytes(4))}, "does not hold y, of which the manifest has"),
        ({"x": Tiles(16, 4, bytes(8)), "empty": Tiles(1, 4, b"")}, "does not hold empty, of which the manifest has"),
    ],
)
def test_checksums_that_do_not_fit_the_tensors_of_the_file_are_damage(tmp_path: Path, tiles, message: str) -> None:
    path = tmp_path / "a.safetensors"
    written = write(path, {"x": torch.arange(20.0), "empty": torch.zeros(0, 3)})
    assert written.record.tiles["x"].rows == 16
    with pytest.raises(DamagedCheckpointError, match=message):
        VerifiedFile(tmp_path, path.name, dataclasses.replace(written.record, tiles=tiles))


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

    pieces = [OutgoingPiece(f"w{i}", (64, 8), torch.float32, Rectangle.whole((64, 8)), None, chunks) for i in range(5)]
    write_file(tmp_path / "a.safetensors", pieces, tile_bytes=128)
    assert len(previous) == 20
