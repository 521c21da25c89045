"""Both ways to compute the cross-entropy are right, consume the logits, and can be differentiated once only."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.topology import Axis

TOKENS, VOCABULARY, PADDED = 6, 29, 32


def logits_and_targets(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(TOKENS, PADDED, generator=generator, dtype=torch.float64).to(dtype)
    return logits.requires_grad_(), torch.randint(VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_loss_and_gradient_equal_torch(dtype, tolerance, compile):
    logits, targets = logits_and_targets(dtype)
    weights = torch.arange(1.0, TOKENS + 1, dtype=dtype)
    expected = F.cross_entropy(logits[:, :VOCABULARY], targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected, logits, weights)
    loss = vocab_parallel_cross_entropy(logits * 1, targets, Axis("tp"), vocab_size=VOCABULARY, compile=compile)
    (gradient,) = torch.autograd.grad(loss, logits, weights)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance * TOKENS)
    assert not gradient[:, VOCABULARY:].any()


def test_gradient_agrees_with_finite_differences():
    """By hand: gradcheck goes back through one graph several times, which consumed logits refuse."""
    logits, targets = logits_and_targets()

    def loss(z):
        return vocab_parallel_cross_entropy(z * 1, targets, Axis("tp"), vocab_size=VOCABULARY).sum()

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    direction = torch.randn(TOKENS, PADDED, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        slope = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
    # Central differences err by step^2 times a third derivative of order 10, and by 1e-16 / step in rounding.
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-8, atol=1e-8)


def test_a_second_backward_pass_is_refused():
    logits, targets = logits_and_targets()
    loss = vocab_parallel_cross_entropy(logits * 1, targets, Axis("tp"), vocab_size=VOCABULARY).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_loss_of_half_precision_is_computed_in_float32_and_its_gradient_written_in_place():
    logits, targets = logits_and_targets(torch.bfloat16)
    copy = logits * 1
    loss = vocab_parallel_cross_entropy(copy, targets, Axis("tp"), vocab_size=VOCABULARY, compile=True)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact[:, :VOCABULARY], targets, reduction="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), copy)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert gradient.dtype == torch.bfloat16 and gradient.data_ptr() == copy.data_ptr()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-8, atol=1e-6)  # one rounding


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("num_columns", [512, 5000, 128256])
def test_on_a_gpu_the_softmax_may_overwrite_its_input(num_columns, compile):
    """CUDA has one softmax kernel for rows that fit in registers, one for shared memory, and one for any length."""
    logits = torch.randn(64, num_columns, device="cuda").requires_grad_()
    targets = torch.randint(num_columns, (64,), device="cuda")
    expected = F.cross_entropy(logits, targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    loss = vocab_parallel_cross_entropy(logits * 1, targets, Axis("tp"), vocab_size=num_columns, compile=compile)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
