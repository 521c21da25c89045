"""Layers cut over the tensor axis compute what the whole layer computes, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from distributed import run_distributed
from megatron.core.collectives import gather_last_dim, split
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Block, fill
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    shard_specs,
    vocab_parallel_cross_entropy,
)
from megatron.core.topology import Axis, Topology

S, B, H, V = 8, 3, 12, 29
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of at most 48 terms of order 1


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor_axis(size):
    return Topology.create(ParallelLayout(tp=size)).tp


def load(module, full, tp):
    module.double()
    for name, spec in shard_specs(module).items():
        with torch.no_grad():
            module.get_parameter(name).copy_(spec.take(full, tp.rank, tp.size))
    return module


def check_gradients(module, full, tp):
    """Each local gradient is this rank's part of the whole one; partial sums are added up first."""
    for name, spec in shard_specs(module).items():
        gradient = module.get_parameter(name).grad
        for region in spec.regions(tp.rank, tp.size):
            mine = gradient[region.local_slices].clone()
            if spec.gradient == "partial":
                torch.distributed.all_reduce(mine)
            torch.testing.assert_close(mine, full[region.name].grad[region.global_slices], **TOLERANCE)


def leaf(*shape, seed):
    return rand(*shape, seed=seed).requires_grad_()


def mlp_pair(size, sequence_parallel):
    """down(gelu(up(x))) with biases: a column-parallel and a row-parallel linear, as in every layer."""
    tp = tensor_axis(size)
    full = {"a.weight": leaf(16, H, seed=1), "b.weight": leaf(8, H, seed=2), "a.bias": leaf(16, seed=3)}
    full |= {"b.bias": leaf(8, seed=4), "o.weight": leaf(H, 24, seed=5), "o.bias": leaf(H, seed=6)}
    blocks = (Block("a.weight", (16, H), units=16), Block("b.weight", (8, H), units=4))
    up = load(ColumnParallelLinear(blocks, axis=tp, bias=True, sequence_parallel=sequence_parallel), full, tp)
    # The row-parallel input is this rank's part of a, then of b; its columns are cut the same way by two linears.
    down_a = Block("oa.weight", (H, 16), units=16)
    down_b = Block("ob.weight", (H, 8), units=4)
    full["oa.weight"] = full["o.weight"].detach()[:, :16].clone().requires_grad_()
    full["ob.weight"] = full["o.weight"].detach()[:, 16:].clone().requires_grad_()
    full["oa.bias"] = full["o.bias"].detach().clone().requires_grad_()
    row_a = load(RowParallelLinear(down_a, axis=tp, bias=True, sequence_parallel=sequence_parallel), full, tp)
    row_b = load(RowParallelLinear(down_b, axis=tp, sequence_parallel=sequence_parallel), full, tp)

    x_full = leaf(S, B, H, seed=7)
    hidden = F.gelu(
        F.linear(x_full, torch.cat((full["a.weight"], full["b.weight"])), torch.cat((full["a.bias"], full["b.bias"])))
    )
    expected = F.linear(hidden[..., :16], full["oa.weight"], full["oa.bias"]) + F.linear(
        hidden[..., 16:], full["ob.weight"]
    )
    weights = rand(S, B, H, seed=8)
    (expected * weights).sum().backward()

    x = x_full.detach().clone()
    x = (split(x, tp).contiguous() if sequence_parallel else x).requires_grad_()
    a, b = F.gelu(up(x)).split((16 // size, 8 // size), dim=-1)
    y = row_a(a) + row_b(b)
    part = (lambda t: split(t, tp)) if sequence_parallel else (lambda t: t)
    torch.testing.assert_close(y, part(expected), **TOLERANCE)
    (y * part(weights)).sum().backward()
    torch.testing.assert_close(x.grad, part(x_full.grad), **TOLERANCE)
    for module in (up, row_a, row_b):
        check_gradients(module, full, tp)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_column_then_row_parallel_equals_the_whole_linears(size, sequence_parallel):
    run_distributed(mlp_pair, size, size, sequence_parallel)


def embedding(size, sequence_parallel):
    tp = tensor_axis(size)
    full = {"e": leaf(V, H, seed=1)}
    layer = VocabParallelEmbedding(
        Block("e", (V, H), units=V, padded_units=32), axis=tp, sequence_parallel=sequence_parallel
    )
    load(layer, full, tp)
    tokens = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(2))
    expected = F.embedding(tokens.t(), full["e"])
    weights = rand(S, B, H, seed=3)
    (expected * weights).sum().backward()
    part = (lambda t: split(t, tp)) if sequence_parallel else (lambda t: t)
    y = layer(tokens)
    torch.testing.assert_close(y, part(expected), **TOLERANCE)
    (y * part(weights)).sum().backward()
    check_gradients(layer, full, tp)
    padding = layer.weight.grad[max(0, V - tp.rank * 32 // size) :]
    assert not padding.any()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_parallel_embedding_equals_the_whole_table(size, sequence_parallel):
    run_distributed(embedding, size, size, sequence_parallel)


def cross_entropy_on(tp, padded):
    full = leaf(S, B, V, seed=1)
    targets = torch.randint(V, (S, B), generator=torch.Generator().manual_seed(2))
    expected = F.cross_entropy(full.flatten(0, 1), targets.flatten(), reduction="none").view(S, B)
    weights = rand(S, B, seed=3)
    (expected * weights).sum().backward()
    columns = padded // tp.size
    garbage = torch.full((S, B, padded - V), 1e4, dtype=torch.float64)  # padding must not matter, whatever it holds
    mine = torch.cat((full.detach(), garbage), dim=-1)[..., tp.rank * columns : (tp.rank + 1) * columns]
    mine = mine.contiguous().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine * 1.0, targets, tp, vocab_size=V)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    (loss * weights).sum().backward()
    gradient = torch.cat((full.grad, torch.zeros_like(garbage)), dim=-1)
    torch.testing.assert_close(mine.grad, gradient[..., tp.rank * columns : (tp.rank + 1) * columns], **TOLERANCE)


def cross_entropy(size, padded):
    cross_entropy_on(tensor_axis(size), padded)


# 29 columns on 4 ranks of 32/4, and of 64/4: there the last two ranks hold padding only.
@pytest.mark.parametrize(("size", "padded"), [(2, 32), (4, 32), (4, 64)])
def test_vocabulary_parallel_cross_entropy_equals_the_whole_one(size, padded):
    run_distributed(cross_entropy, size, size, padded)


@pytest.mark.parametrize("padded", [V, 32])
def test_cross_entropy_on_one_rank_equals_torch(padded):
    cross_entropy_on(Axis("tp"), padded)


def test_cross_entropy_of_huge_logits_is_finite_and_half_precision_is_computed_in_float32():
    logits = torch.tensor([[1e4, -1e4, 0.0]], dtype=torch.bfloat16)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([1]), Axis("tp"), vocab_size=3)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.float(), torch.tensor([1]), reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def gathered_logits(size):
    tp = tensor_axis(size)
    y = leaf(S, B, 2, seed=10 + tp.rank)
    whole = gather_last_dim(y, tp)
    torch.testing.assert_close(whole[..., 2 * tp.rank : 2 * tp.rank + 2], y, rtol=0, atol=0)
    weights = rand(S, B, 2 * size, seed=3)
    (whole * weights).sum().backward()
    torch.testing.assert_close(y.grad, weights[..., 2 * tp.rank : 2 * tp.rank + 2], rtol=0, atol=0)


def test_gathered_logits_are_whole_and_each_rank_gets_the_gradient_of_its_part():
    run_distributed(gathered_logits, 2, 2)


def test_filling_by_regions_equals_taking():
    spec = shard_specs(ColumnParallelLinear((Block("a.weight", (8, 4), units=8),), axis=Axis("tp")))["weight"]
    full = {"a.weight": rand(8, 4, seed=1)}
    local = torch.zeros(8, 4, dtype=torch.float64)
    fill(local, spec.regions(0, 1), lambda region: full[region.name][region.global_slices])
    assert torch.equal(local, spec.take(full, 0, 1))
