"""Tiles end where slices do, are as large as they may be, and lie over every byte once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.checkpoint.tiles import TILE_BYTES, TileGrid, tile_shape
from megatron.core.sharding import Block, Cut, ShardSpec

BF16, FP32 = torch.bfloat16, torch.float32
COLUMNS, ROWS, PADDED_ROWS = Cut(1), Cut(0), Cut(0, is_even=False)


@pytest.mark.parametrize(
    ("shape", "dtype", "cut", "expected"),
    [
        ((4096, 4096), BF16, ROWS, (128, 8192)),  # 512 rows are an eighth; 128 of them a MiB
        ((11008, 4096), BF16, ROWS, (86, 8192)),  # 1376 = 16 x 86
        ((32, 4096), BF16, ROWS, (4, 8192)),  # small, but an eighth
        ((1001, 4096), BF16, ROWS, (128, 8192)),  # nothing divides it
        ((8 * 1009, 4096), BF16, ROWS, (128, 8192)),  # 1009 is prime: tiles of one row would be tiny
        ((4096, 11008), BF16, COLUMNS, (47, 2752)),
        ((4096, 4100), BF16, COLUMNS, (127, 2050)),  # four parts; eight would not be whole columns
        ((4096, 4097), BF16, COLUMNS, (127, 8194)),
        ((16, 3, 5), BF16, COLUMNS, (16, 30)),
        ((32000, 4096), BF16, PADDED_ROWS, (128, 8192)),
        ((128256, 8192), FP32, PADDED_ROWS, (32, 32768)),
        ((50257, 768), BF16, PADDED_ROWS, (128, 1536)),
        ((4096,), FP32, None, (4096, 4)),
        ((4096, 4096), FP32, None, (64, 16384)),
        ((3, 2**20), FP32, None, (1, 2**20)),  # a row of 4 MiB
        ((), FP32, None, (1, 4)),
    ],
)
def test_tiles_of_known_tensors(shape, dtype, cut, expected) -> None:
    assert tile_shape(shape, dtype, cut, TILE_BYTES) == expected


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_slices_of_published_models_begin_and_end_with_tiles(tp_size: int, dtype: torch.dtype) -> None:
    """Hidden size, feed-forward size, key and value rows, and rows of the vocabulary, none of them padded."""
    for hidden, ffn, kv, vocab in (
        (2048, 5504, 2048, 32000),
        (4096, 11008, 4096, 32016),
        (4096, 14336, 1024, 128256),
        (5120, 13824, 5120, 32000),
        (8192, 28672, 1024, 128256),
        (3584, 18944, 512, 152064),
        (896, 4864, 128, 151936),
        (768, 3072, 768, 50257),
    ):
        padded = -(-vocab // (128 * tp_size)) * 128 * tp_size
        for spec in (
            ShardSpec((Block("q", (hidden, hidden), 8), Block("k", (kv, hidden), 8)), dim=0),
            ShardSpec((Block("gate", (ffn, hidden), ffn),), dim=0),
            ShardSpec((Block("down", (hidden, ffn), ffn),), dim=1),
            ShardSpec((Block("word", (vocab, hidden), vocab, padded),), dim=0),
        ):
            for region in (r for tp_rank in range(tp_size) for r in spec.regions(tp_rank, tp_size)):
                rows, columns = tile_shape(region.global_shape, dtype, region.cut, TILE_BYTES)
                for tile, unit, dim in ((rows, 1, 0), (columns, dtype.itemsize, 1)):
                    end = region.start[dim] + region.size[dim]
                    assert region.start[dim] * unit % tile == 0, region
                    assert end * unit % tile == 0 or end == region.global_shape[dim], region


shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple)
cuts = st.sampled_from([None, ROWS, PADDED_ROWS, COLUMNS])


@given(shapes, st.sampled_from([BF16, FP32, torch.uint8]), cuts, st.integers(1, 500))
def test_every_byte_lies_in_one_tile_and_groups_keep_the_limit(shape, dtype, cut, limit_bytes) -> None:
    if cut is not None and cut.dim >= len(shape):
        cut = None
    rows, columns = tile_shape(shape, dtype, cut, limit_bytes)
    grid = TileGrid.over(shape, dtype, rows, columns)
    assert grid.num_rows * grid.row_bytes == math.prod(shape) * dtype.itemsize
    assert columns % dtype.itemsize == 0
    assert rows == 1 or rows * grid.row_bytes <= limit_bytes
    assert rows * columns <= max(limit_bytes, dtype.itemsize)
    assert [row for group in range(grid.num_groups) for row in grid.rows_of(group)] == list(range(grid.num_rows))
    strips = [grid.bytes_of(range(strip, strip + 1)) for strip in grid.strips]
    assert [byte for strip in strips for byte in strip] == list(range(grid.row_bytes))
    assert grid.num_tiles == grid.num_groups * len(strips)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70), st.data())
def test_what_covers_a_part_is_the_groups_and_strips_that_share_something_with_it(
    num_rows, rows, columns, data
) -> None:
    grid = TileGrid(num_rows, 60, rows, columns)
    first = data.draw(st.integers(0, num_rows - 1))
    wanted = range(first, data.draw(st.integers(first + 1, num_rows)))
    found = dict(grid.groups_with(wanted))
    assert [row for part in found.values() for row in part] == list(wanted)
    assert all(part and set(part) <= set(grid.rows_of(group)) for group, part in found.items())
    left = data.draw(st.integers(0, 59))
    wanted = range(left, data.draw(st.integers(left + 1, 60)))
    assert list(grid.strips_with(wanted)) == sorted({byte // columns for byte in wanted})
