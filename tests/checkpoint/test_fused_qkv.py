"""Fused rows and the rows of their parts: each row has one place, and going there and back changes nothing."""

from __future__ import annotations

import pytest
import torch

from megatron.checkpoint.fused_qkv import RowRun, grouped_qkv, join_rows, split_rows, stacked

HEADS = {"multi-head": (6, 6), "grouped": (6, 2), "multi-query": (6, 1)}
DIM = 5


def random_parts(num_heads: int, num_heads_kv: int, *shape: int):
    torch.manual_seed(0)
    return {
        part: torch.randn(n * DIM, *shape) for part, n in (("q", num_heads), ("k", num_heads_kv), ("v", num_heads_kv))
    }


@pytest.mark.parametrize("shape", [(7,), ()], ids=["weight", "bias"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_fusing_and_splitting_gives_every_row_back(heads, shape):
    parts, runs = random_parts(*heads, *shape), grouped_qkv(*heads, DIM)
    fused = join_rows(parts, runs)
    assert fused.shape == ((heads[0] + 2 * heads[1]) * DIM, *shape)
    returned = split_rows(fused, runs)
    assert returned.keys() == parts.keys()
    assert all(torch.equal(returned[part], parts[part]) for part in parts)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_grouped_order_is_the_view_by_groups_of_heads(heads):
    """Independent: [kv, n / kv + 2, d, h], of which the last two of dimension 1 are key and value."""
    (num_heads, num_heads_kv), parts = heads, random_parts(*heads, 7)
    view = join_rows(parts, grouped_qkv(*heads, DIM)).view(num_heads_kv, num_heads // num_heads_kv + 2, DIM, 7)
    assert torch.equal(view[:, :-2].reshape(-1, 7), parts["q"])
    assert torch.equal(view[:, -2].reshape(-1, 7), parts["k"])
    assert torch.equal(view[:, -1].reshape(-1, 7), parts["v"])


def test_stacked_order_is_concatenation():
    parts = random_parts(6, 2, 7)
    runs = stacked({part: len(tensor) for part, tensor in parts.items()})
    assert torch.equal(join_rows(parts, runs), torch.cat(list(parts.values())))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_fused_row_is_in_one_run(heads):
    runs = grouped_qkv(*heads, DIM)
    rows = [run.fused_row + i for run in runs for i in range(run.num_rows)]
    assert rows == list(range((heads[0] + 2 * heads[1]) * DIM))


@pytest.mark.parametrize("first", range(4, 13))
@pytest.mark.parametrize("num_rows", [0, 1, 3, 9])
def test_a_cut_run_holds_the_common_rows(first, num_rows):
    run = RowRun("q", part_row=100, fused_row=6, num_rows=5)
    common = sorted(set(range(6, 11)) & set(range(first, first + num_rows)))
    expected = RowRun("q", 100 + common[0] - 6, common[0], len(common)) if common else None
    assert run.within_fused(first, num_rows) == expected
    assert run.within_part(first + 94, num_rows) == expected
