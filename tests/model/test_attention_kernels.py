"""What a query sees under each pattern, against the definition of attention, in float64."""

import sys
from types import ModuleType

import pytest
import torch

from megatron.model.attention_kernels import AttentionPattern, banded_attention, flash_attention, sdpa_attention

S, B, HEADS, KV_HEADS, D = 23, 2, 4, 2, 6


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((S, B, HEADS, D), (S, B, KV_HEADS, D), (S, B, KV_HEADS, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_definition(q, k, v, sees):
    """`sees(row, query, key)` decides about every pair on its own."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / D**0.5
    seen = torch.tensor([[[sees(row, i, j) for j in range(S)] for i in range(S)] for row in range(B)])
    return torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1), v)


# Runs of different lengths, one number twice in the first row, and padding at the end of the second.
SEGMENTS = torch.tensor([[7] * 5 + [2] * 9 + [7] * 9, [1] * 16 + [0] * 7])


# The same cuts as the batches of a loader have them: every run with a number of its own.
RUN_LENGTHS = ((5, 9, 9), (16, 7))
RUNS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in RUN_LENGTHS])


def in_run(row, i, j):
    return RUNS[row, i] == RUNS[row, j]


def same(row, i, j):
    return SEGMENTS[row, i] == SEGMENTS[row, j]


PATTERNS = {
    "causal": (AttentionPattern(), lambda row, i, j: j <= i),
    "both ways": (AttentionPattern(is_causal=False), lambda row, i, j: True),
    "window": (AttentionPattern(window=4), lambda row, i, j: i - 4 < j <= i),
    "itself only": (AttentionPattern(window=1), lambda row, i, j: i == j),
    "window as wide as the sequence": (AttentionPattern(window=S), lambda row, i, j: j <= i),
    "segments": (AttentionPattern(segment_ids=SEGMENTS), lambda row, i, j: j <= i and same(row, i, j)),
    "segments, both ways": (AttentionPattern(is_causal=False, segment_ids=SEGMENTS), same),
    "runs": (
        AttentionPattern(segment_ids=RUNS, segment_lengths=RUN_LENGTHS),
        lambda row, i, j: j <= i and in_run(row, i, j),
    ),
    "runs, both ways": (
        AttentionPattern(is_causal=False, segment_ids=RUNS, segment_lengths=RUN_LENGTHS),
        in_run,
    ),
    "runs, window": (
        AttentionPattern(window=4, segment_ids=RUNS, segment_lengths=RUN_LENGTHS),
        lambda row, i, j: i - 4 < j <= i and in_run(row, i, j),
    ),
    "segments, window": (
        AttentionPattern(window=4, segment_ids=SEGMENTS),
        lambda row, i, j: i - 4 < j <= i and same(row, i, j),
    ),
}


def assert_same_values_and_gradients(actual, expected, leaves):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for a, e in zip(*(torch.autograd.grad(x, leaves, weights) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", PATTERNS)
def test_sdpa_attention_sees_what_the_pattern_says(name):
    pattern, sees = PATTERNS[name]
    leaves = inputs()
    assert_same_values_and_gradients(sdpa_attention(*leaves, pattern, 0.0), by_definition(*leaves, sees), leaves)


@pytest.mark.parametrize(("window", "block"), [(4, 8), (8, 8), (5, 5), (3, 22), (1, 1), (4, 64)])
def test_blocks_of_any_size_make_the_same_band(window, block):
    """Blocks that divide the sequence and that do not, as wide as the window and wider, and one for all."""
    leaves = inputs()
    q, k, v = (x.permute(1, 2, 0, 3) for x in leaves)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    out = banded_attention(q, k, v, window, 0.0, smallest_block=block).permute(2, 0, 1, 3)
    assert_same_values_and_gradients(out, by_definition(*leaves, lambda row, i, j: i - window < j <= i), leaves)


class FlashAttention(ModuleType):
    """The interface of the flash-attn package over this file's definition of attention."""

    def flash_attn_func(self, q, k, v, *, dropout_p, causal, window_size, deterministic):
        assert dropout_p == 0.0 and not deterministic
        pattern = AttentionPattern(causal, None if window_size == (-1, -1) else window_size[0] + 1)
        assert window_size in ((-1, -1), (3, 0))
        return sdpa_attention(*(x.transpose(0, 1) for x in (q, k, v)), pattern, 0.0).transpose(0, 1)

    def flash_attn_varlen_func(self, q, k, v, bounds_q, bounds_k, longest_q, longest_k, **options):
        assert bounds_q is bounds_k and bounds_q.dtype == torch.int32
        lengths = bounds_q.diff().tolist()
        assert longest_q == longest_k == max(lengths) and sum(lengths) == len(q)
        texts = zip(*(x.unsqueeze(0).split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([self.flash_attn_func(*text, **options)[0] for text in texts])


@pytest.mark.parametrize("name", ["causal", "both ways", "window", "runs", "runs, both ways", "runs, window"])
def test_flash_attention_is_asked_for_what_the_pattern_says(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttention("flash_attn"))
    pattern, sees = PATTERNS[name]
    leaves = inputs()
    assert_same_values_and_gradients(flash_attention(*leaves, pattern, 0.0), by_definition(*leaves, sees), leaves)
    if pattern.segment_lengths is not None:
        assert pattern.segment_bounds(leaves[0].device) is pattern.segment_bounds(leaves[0].device)


def test_layers_share_one_mask():
    pattern = AttentionPattern(segment_ids=SEGMENTS)
    assert pattern.segment_mask(torch.float64) is pattern.segment_mask(torch.float64)
    assert pattern.segment_mask(torch.float64).shape == (B, 1, S, S)


@pytest.mark.parametrize("name", ["window", "segments", "runs"])
def test_dropout_spares_a_part_of_the_probabilities(name):
    """The mean over many draws is attention without dropout."""
    pattern, sees = PATTERNS[name]
    q, k, v = (x.detach() for x in inputs())
    torch.manual_seed(0)
    draws = [sdpa_attention(q, k, v, pattern, 0.25) for _ in range(400)]
    assert not torch.equal(draws[0], draws[1])
    # One draw differs by less than 2; the mean of 400 by a twentieth of its spread.
    torch.testing.assert_close(sum(draws) / 400, by_definition(q, k, v, sees), rtol=0, atol=0.25)
