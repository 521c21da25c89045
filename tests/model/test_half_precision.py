"""In bf16 the order of casts is a part of the model: each family rounds where `transformers` rounds."""

import pytest
import torch

from megatron.core.topology import Axis
from megatron.model.embedding import Embedding
from megatron.model.norm import Norm
from reference import FAMILIES, tiny_config

WIDTH = 1000


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def ours(weight, *, one_plus):
    norm = Norm("n", WIDTH, epsilon=1e-6, use_rms_norm=True, one_plus=one_plus).bfloat16()
    norm.weight = torch.nn.Parameter(weight)
    return norm


def theirs(weight, *, one_plus):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    norm = (GemmaRMSNorm if one_plus else Qwen3RMSNorm)(WIDTH, eps=1e-6)
    norm.weight = torch.nn.Parameter(weight)
    return norm


def share_of_equal(a, b):
    return (a == b).double().mean().item()


@pytest.mark.parametrize("one_plus", [False, True])
def test_norms_round_as_those_of_transformers(one_plus):
    x, weight = random(50, WIDTH), random(WIDTH, seed=1)
    out, expected = (make(weight, one_plus=one_plus)(x) for make in (ours, theirs))
    # The mean square is added up in another order in fp32, which rarely moves a result across a boundary of bf16.
    assert share_of_equal(out, expected) > 0.999
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    factor = 1 + weight.float() if one_plus else weight.float()
    early, late = normed.bfloat16() * factor.bfloat16(), (normed * factor).bfloat16()
    assert share_of_equal(early if one_plus else late, expected) < 0.9  # the other family's order


def test_embeddings_are_scaled_by_a_rounded_factor():
    from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

    config = tiny_config(**{**FAMILIES["gemma"], "hidden_size": 48, "kv_channels": 6}, vocab_size=64)
    embedding = Embedding(config, Axis("tp"), sequence_parallel=False, padded_vocab_size=64).bfloat16()
    table = random(64, 48)
    embedding.word.weight = torch.nn.Parameter(table)
    reference = GemmaTextScaledWordEmbedding(64, 48, padding_idx=None, embed_scale=48**0.5)
    reference.weight = torch.nn.Parameter(table)
    tokens = torch.arange(64).reshape(2, 32)
    out = embedding(tokens, None, None, None).transpose(0, 1)
    assert torch.equal(out, reference(tokens))
    # Unrounded, sqrt(48) = 6.928 would be another factor than 6.9375.
    assert not torch.equal(out, (table[tokens].float() * 48**0.5).bfloat16())
