"""Hand-written backward passes are the derivatives of what they compute, and compute what the plain expressions do."""

from functools import partial

import pytest
import torch

from megatron.model.gate import GatedActivation, gated_activation
from megatron.model.norm import Norm, normalise
from megatron.model.rope import RotaryEmbedding, Rotate, SplitAndRotate, rotate, split_and_rotate

S, B, H, HEADS, KV_HEADS, HEAD_DIM = 5, 2, 12, 4, 2, 6


def leaf(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def rms_norm(weight, epsilon=1e-3, *, one_plus=False):
    norm = Norm("n", H, epsilon=epsilon, use_rms_norm=True, one_plus=one_plus)
    norm.weight = torch.nn.Parameter(weight)
    return norm


def rotary_table(position_ids=None, dtype=torch.float64):
    return RotaryEmbedding(HEAD_DIM, 100.0, None).table(S, position_ids, torch.empty((), dtype=dtype))


def check(kernel, expression, inputs):
    """Equal values and gradients to rounding in float64, and gradients that agree with finite differences."""
    actual, expected = kernel(*inputs), expression(*inputs)
    pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
    weights = []
    for i, (a, e) in enumerate(pairs):
        torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-13)
        weights.append(torch.randn(a.shape, generator=torch.Generator().manual_seed(i), dtype=a.dtype))
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    ours = torch.autograd.grad(actual, inputs, weights)
    theirs = torch.autograd.grad(expected, inputs, weights)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(kernel, inputs)


@pytest.mark.parametrize("one_plus", [False, True])
def test_rms_norm(one_plus):
    def kernel(x, weight):
        norm = rms_norm(weight, one_plus=one_plus)
        del norm._parameters["weight"]
        norm.weight = weight  # a tensor that gradcheck can follow
        return norm(x)

    expression = partial(normalise, bias=None, epsilon=1e-3, one_plus=one_plus)
    check(kernel, expression, (leaf(S, B, H), leaf(H, seed=1)))


@pytest.mark.parametrize("one_plus", [False, True])
def test_rms_norm_of_half_precision_rounds_as_the_plain_expression(one_plus):
    """Forward: normalised in float32, rounded, then weighted; by 1 + weight, weighted, then rounded.

    Backward: in float32, and closer to float64 than 1%.
    """
    x, weight = leaf(S, B, H, dtype=torch.bfloat16), leaf(H, seed=1, dtype=torch.bfloat16)
    y = rms_norm(weight.detach(), one_plus=one_plus)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, normalise(x, weight, None, 1e-3, one_plus), rtol=0, atol=0)
    y.sum().backward()
    exact = x.detach().double().requires_grad_()
    normalise(exact, weight.detach().double(), None, 1e-3, one_plus).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["swiglu", "geglu", "geglu_tanh", "liglu", "reglu"])
def test_gated_activation(name):
    check(lambda x: GatedActivation.apply(x, name), lambda x: gated_activation(x, name), (leaf(S, B, 2 * H),))


@pytest.mark.parametrize("positions", [None, torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])])
def test_split_and_rotate(positions):
    heads = (rotary_table(positions), HEADS, KV_HEADS)
    check(
        lambda qkv: SplitAndRotate.apply(qkv, *heads),
        lambda qkv: split_and_rotate(qkv, *heads),
        (leaf(S, B, HEADS + 2 * KV_HEADS, HEAD_DIM),),
    )


def test_rotate():
    table = rotary_table()
    check(lambda x: Rotate.apply(x, table), lambda x: rotate(x, table), (leaf(S, B, HEADS, HEAD_DIM),))


def test_rotation_turns_each_pair_by_its_angle():
    """Against complex numbers: the pair (i, i + d/2) is one number, multiplied by exp(i * position * frequency)."""
    qkv = leaf(S, B, HEADS + 2 * KV_HEADS, HEAD_DIM).detach()
    q, k, v = split_and_rotate(qkv, rotary_table(), HEADS, KV_HEADS)
    frequencies = 100.0 ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angles = (torch.arange(S).float().unsqueeze(1) * frequencies).double().view(S, 1, 1, -1)
    halves = torch.complex(*qkv.chunk(2, dim=-1)) * torch.exp(1j * angles)
    expected = torch.cat((halves.real, halves.imag), dim=-1)
    # The table holds cosines of float32 angles, taken in float32.
    torch.testing.assert_close(torch.cat((q, k), dim=2), expected[:, :, : HEADS + KV_HEADS], rtol=0, atol=1e-6)
    assert torch.equal(v, qkv[:, :, HEADS + KV_HEADS :])
