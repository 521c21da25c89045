"""Random numbers are a function of their key."""

import torch

from megatron.core.random import DropoutStreams, derive_seed, normal_slice


def test_a_slice_equals_the_slice_of_the_whole():
    whole = normal_slice(3, "w", (0, 0), (700, 2100))
    for rows, columns in [
        ((0, 1), (0, 1)),
        ((255, 258), (1000, 1030)),
        ((600, 700), (0, 2100)),
        ((0, 700), (2047, 2100)),
    ]:
        start, size = (rows[0], columns[0]), (rows[1] - rows[0], columns[1] - columns[0])
        part = normal_slice(3, "w", start, size)
        assert torch.equal(part, whole[slice(*rows), slice(*columns)])


def test_vectors_are_cut_the_same_way():
    assert torch.equal(normal_slice(3, "b", (1000,), (500,)), normal_slice(3, "b", (0,), (2000,))[1000:1500])


def test_values_are_standard_normal_and_differ_by_seed_name_and_tile():
    x = normal_slice(1, "w", (0, 0), (1024, 1024))
    # The mean of n normals has deviation 1/sqrt(n) = 0.001, their variance sqrt(2/n) = 0.0014: five of each.
    assert abs(x.mean()) < 0.005 and abs(x.var() - 1) < 0.007
    assert not torch.equal(x, normal_slice(2, "w", (0, 0), (1024, 1024)))
    assert not torch.equal(x, normal_slice(1, "v", (0, 0), (1024, 1024)))
    assert not torch.equal(x[:256], x[256:512])


def test_seeds_depend_on_every_part_of_the_key_and_on_its_type():
    keys = [(1, "a"), ("1", "a"), (1, "b"), ("1a",), (1, "a", 0), ("a", 1)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


def test_dropout_repeats_for_the_same_key_and_differs_for_any_other():
    x = torch.ones(4000, dtype=torch.float64)
    base = {"layer": 3, "site": "mlp_output", "shard": 0}

    def mask(seed=1, step=2, microbatch=3, **where):
        return DropoutStreams(seed, step, microbatch).dropout(x, 0.25, **{**base, **where})

    assert torch.equal(mask(), mask())
    others = [mask(seed=9), mask(step=9), mask(microbatch=9), mask(layer=9), mask(site="attention"), mask(shard=1)]
    assert not any(torch.equal(mask(), other) for other in others)
    kept = mask() > 0
    # 4000 trials at p = 0.75 have deviation 27: five of them.
    assert abs(kept.sum() - 3000) < 137
    assert torch.equal(mask()[kept], torch.full((int(kept.sum()),), 1 / 0.75, dtype=torch.float64))


def test_the_default_generator_is_seeded_inside_and_restored_after():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    stream = DropoutStreams(1, 2, 3)
    with stream.default_generator(torch.device("cpu"), layer=0, site="attention"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with stream.default_generator(torch.device("cpu"), layer=0, site="attention"):
        assert torch.equal(torch.rand(3), first)
