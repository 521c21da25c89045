"""Resharding arithmetic against element-by-element counting."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_samples import stage_specs, whole_tensors
from megatron.checkpoint.plan import Rectangle, parts_of, tiling_defect
from megatron.core.sharding import Block, ShardSpec


def count(shape: tuple[int, ...], rectangles: list[Rectangle]) -> torch.Tensor:
    """How many rectangles each element lies in, counted one by one."""
    hits = torch.zeros(shape, dtype=torch.int64)
    for rectangle in rectangles:
        hits[rectangle.slices_in(Rectangle.whole(shape))] += 1
    return hits


def cut_at_random(whole: Rectangle, source: random.Random, depth: int) -> list[Rectangle]:
    """A tiling made by cutting in two again and again, at any place along any dimension."""
    dims = [d for d, n in enumerate(whole.size) if n > 1]
    if depth == 0 or not dims:
        return [whole]
    d = source.choice(dims)
    cut = source.randrange(1, whole.size[d])
    low, high = list(whole.size), list(whole.size)
    low[d], high[d] = cut, whole.size[d] - cut
    start = list(whole.start)
    start[d] += cut
    halves = Rectangle(whole.start, tuple(low)), Rectangle(tuple(start), tuple(high))
    return [piece for half in halves for piece in cut_at_random(half, source, depth - 1)]


shapes = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)


@settings(max_examples=100)
@given(shapes, st.integers(0, 2**32), st.integers(0, 4))
def test_a_random_tiling_has_no_defect_and_every_rectangle_is_tiled_by_its_parts(shape, seed, depth) -> None:
    source = random.Random(seed)
    pieces = cut_at_random(Rectangle.whole(shape), source, depth)
    source.shuffle(pieces)
    assert tiling_defect(shape, pieces) is None
    start = tuple(source.randrange(n) for n in shape)
    wanted = Rectangle(start, tuple(source.randint(1, n - a) for a, n in zip(start, shape, strict=True)))
    parts = parts_of(wanted, pieces)
    assert all(pieces[part.piece].contains(part.rectangle) for part in parts)
    assert torch.equal(count(shape, [part.rectangle for part in parts]), count(shape, [wanted]))


@settings(max_examples=200)
@given(shapes, st.integers(0, 2**32), st.integers(0, 6))
def test_a_defect_is_reported_exactly_when_some_element_is_not_covered_once(shape, seed, num_pieces) -> None:
    source = random.Random(seed)
    starts = [tuple(source.randrange(n) for n in shape) for _ in range(num_pieces)]
    pieces = [
        Rectangle(start, tuple(source.randint(1, n - a) for a, n in zip(start, shape, strict=True))) for start in starts
    ]
    assert (tiling_defect(shape, pieces) is None) == bool((count(shape, pieces) == 1).all())


def test_defects_are_told_apart() -> None:
    top, middle = Rectangle((0, 0), (2, 3)), Rectangle((1, 1), (2, 2))
    assert tiling_defect((4, 3), [top]) == "6 of its 12 elements are in no piece"
    assert tiling_defect((4, 3), [middle, top]) == "the pieces [0:2, 0:3] and [1:3, 1:3] overlap"
    assert "does not lie in the shape [1, 3]" in str(tiling_defect((1, 3), [top]))


@settings(max_examples=100)
@given(
    tp=st.sampled_from((1, 2, 4, 8)),
    num_shards=st.integers(1, 5),
    heads_kv=st.sampled_from((1, 2, 4, 8)),
    vocab=st.integers(1, 70),
)
def test_owned_regions_of_every_layout_tile_every_logical_tensor(tp, num_shards, heads_kv, vocab) -> None:
    """Copies of key/value heads, padding and row shards neither repeat nor lose an element."""
    padded = math.ceil(vocab / (4 * tp)) * 4 * tp
    specs = [
        ShardSpec((Block("q", (16, 6), 8), Block("k", (heads_kv * 2, 6), heads_kv)), dim=0),
        ShardSpec((Block("out", (6, 16), 8),), dim=1),
        ShardSpec((Block("vocab", (vocab, 6), vocab, padded),), dim=0),
        ShardSpec((Block("norm", (6,)),)),
    ]
    for spec in specs:
        regions = [
            region
            for t in range(tp)
            for shard in range(num_shards)
            for region in spec.regions(t, tp, shard, num_shards)
        ]
        for block in spec.blocks:
            owned = [Rectangle(r.start, r.size) for r in regions if r.name == block.name and r.copy == 0]
            assert tiling_defect(block.global_shape, owned) is None


@pytest.mark.parametrize("pp_size", [1, 2, 3, 4, 5])
def test_pipeline_stages_deal_out_names_and_never_rename(pp_size: int) -> None:
    names = [b.name for pp in range(pp_size) for spec in stage_specs(pp, pp_size, 1) for b in spec.blocks]
    assert sorted(f"model.{name}" for name in names) == sorted(n for n in whole_tensors() if n.startswith("model."))


def test_thousands_of_row_shards_are_checked_by_sorting() -> None:
    """Compared pairwise this would be 8 million intersections for one entry."""
    pieces = [Rectangle((row, 0), (1, 8)) for row in range(4096)]
    assert tiling_defect((4096, 8), pieces[::-1]) is None
