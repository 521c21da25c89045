"""What a rank holds is a set of rectangles, and together they are the logical tensors."""

import pytest
import torch

from megatron.core.sharding import Block, Cut, ShardSpec, fill
from megatron.errors import ConfigError

H = 6
QKV = (
    Block("q", (8 * 3, H), units=8),
    Block("k", (2 * 3, H), units=2),
    Block("v", (2 * 3, H), units=2),
)
SPECS = {
    "fused with copies": ShardSpec(QKV, dim=0),
    "row parallel": ShardSpec((Block("o", (H, 24), units=8),), dim=1),
    "replicated": ShardSpec((Block("n", (5, 2)),)),
    "replicated vector": ShardSpec((Block("n", (7,)),)),
    "padded vocabulary": ShardSpec((Block("e", (1031, 2), units=1031, padded_units=1152),), dim=0),
    "vector": ShardSpec((Block("qb", (24,), units=8), Block("kb", (6,), units=2)), dim=0),
}


def whole(spec):
    generator = torch.Generator().manual_seed(0)
    return {block.name: torch.rand(block.global_shape, generator=generator) + 1 for block in spec.blocks}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_owned_regions_of_all_ranks_cover_each_logical_tensor_exactly_once(spec, tp_size, num_shards):
    counts = {block.name: torch.zeros(block.global_shape) for block in spec.blocks}
    for tp_rank in range(tp_size):
        for shard in range(num_shards):
            for region in spec.regions(tp_rank, tp_size, shard, num_shards):
                if region.copy == 0:
                    counts[region.name][region.global_slices] += 1
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_row_shards_filled_from_regions_are_torch_chunks_of_the_local_tensor(spec, tp_size, num_shards):
    full = whole(spec)
    for tp_rank in range(tp_size):
        local = spec.take(full, tp_rank, tp_size)
        assert tuple(local.shape) == spec.local_shape(tp_size)
        chunks = local.chunk(num_shards)
        for shard in range(num_shards):
            expected = chunks[shard] if shard < len(chunks) else local[:0]
            rows = torch.zeros_like(expected)
            regions = spec.regions(tp_rank, tp_size, shard, num_shards)
            fill(rows, regions, lambda region: full[region.name][region.global_slices])
            torch.testing.assert_close(rows, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("tp_size", "num_shards"), [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("name", SPECS)
def test_a_region_says_how_its_tensor_is_cut_on_any_number_of_ranks(name, tp_size, num_shards):
    cut = {
        "row parallel": Cut(1),
        "replicated": None,
        "replicated vector": None,
        "padded vocabulary": Cut(0, is_even=False),
    }.get(name, Cut(0))
    for shard in range(num_shards):
        assert {region.cut for region in SPECS[name].regions(0, tp_size, shard, num_shards)} == {cut}


def test_fused_heads_are_dealt_out_and_few_key_heads_are_copied():
    full = whole(SPECS["fused with copies"])
    q, k, v = (full[name].view(-1, 3, H) for name in "qkv")
    for rank in range(4):
        expected = torch.cat([q[2 * rank : 2 * rank + 2], k[rank // 2 : rank // 2 + 1], v[rank // 2 : rank // 2 + 1]])
        local = SPECS["fused with copies"].take(full, rank, 4)
        torch.testing.assert_close(local, expected.reshape(-1, H), rtol=0, atol=0)
        copies = {region.name: region.copy for region in SPECS["fused with copies"].regions(rank, 4)}
        assert copies == {"q": 0, "k": rank % 2, "v": rank % 2}


def test_padding_is_zero_and_no_region_covers_it():
    spec = SPECS["padded vocabulary"]
    local = spec.take(whole(spec), 3, 4)
    assert local.shape == (288, 2)
    real = 1031 - 3 * 288
    assert (local[:real] > 0).all() and (local[real:] == 0).all()


def test_the_copy_of_a_tied_parameter_owns_nothing():
    spec = ShardSpec(SPECS["padded vocabulary"].blocks, dim=0, tied="copy")
    assert all(region.copy > 0 for rank in range(4) for region in spec.regions(rank, 4))


def test_units_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(ConfigError, match="o: 8 units cannot be split over --tensor_model_parallel_size 3; use"):
        SPECS["row parallel"].local_shape(3)
