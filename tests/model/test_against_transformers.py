"""The serial model is the model `transformers` computes."""

import pytest
import torch

from families import logical_shape, transformers_model
from megatron.core.tensor_parallel import shard_specs
from megatron.model.config import RopeScaling
from reference import FAMILIES, logits_of, seeded, serial_stage, tiny_config

LLAMA_VARIANTS = {
    "multi-head": {"num_attention_heads_kv": 8},
    "multi-query": {"num_attention_heads_kv": 1},
    "tied": {"tie_embed_logits": True},
    "biases": {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "wide heads": {"kv_channels": 12},
    "theta": {"rope_theta": 1e6, "layernorm_epsilon": 1e-3},
    "linear scaling": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama3 scaling": {
        "rope_theta": 5e5,
        "kv_channels": 32,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_position_embeddings=32),
    },
}
VARIANTS = {
    **FAMILIES,
    **{f"llama, {name}": overrides for name, overrides in LLAMA_VARIANTS.items()},
    "mistral, window of two": {"sliding_window_size": 2},
    "mistral, window as wide as the sequence": {"sliding_window_size": 41, "rope_theta": 1e5},
    "mistral, no window": {"sliding_window_size": None, "rope_theta": 1e7},
    "falcon 40, one norm": {**FAMILIES["falcon 40"], "parallel_layernorm": False},
    "falcon 7, one after the other": {**FAMILIES["falcon 7"], "parallel_attn": False},
    "falcon 7, biases": {
        **FAMILIES["falcon 7"],
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    "gpt2, exact gelu": {**FAMILIES["gpt2"], "mlp_activation": "gelu"},
    "gemma, multi-query": {**FAMILIES["gemma"], "num_attention_heads_kv": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers_in_float64(variant):
    config = tiny_config(**VARIANTS[variant])
    read = seeded(config)
    ours, theirs = serial_stage(config, read), transformers_model(variant.replace(",", "").split()[0], config, read)
    tokens = torch.randint(config.vocab_size, (3, 41), generator=torch.Generator().manual_seed(5))
    logits, expected = logits_of(ours, tokens), theirs.module(tokens).logits
    # float64 has 16 digits; 5 layers of sums of at most 64 terms lose fewer than 4 of them.
    assert (logits - expected).abs().max() <= 1e-10 * expected.abs().max()

    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    expected_gradients = theirs.gradients()
    for name, spec in shard_specs(ours).items():
        gradient = ours.get_parameter(name).grad
        for region in spec.regions(0, 1):
            view = expected_gradients.pop(region.name)
            theirs_here = view.reshape(logical_shape(config, region.name, view))
            # The bias of all keys together shifts every score of a query alike: its gradient is zero but for rounding.
            scale = 1.0 if region.name.endswith("attention.k.bias") else theirs_here.abs().max()
            assert (gradient[region.local_slices] - theirs_here).abs().max() <= 1e-10 * scale, region.name
    assert not expected_gradients


def test_each_variant_changes_the_function():
    """A variant that computed the same as another would prove nothing."""
    tokens = torch.arange(40).unsqueeze(0)
    results = []
    for overrides in VARIANTS.values():
        config = tiny_config(**overrides)
        results.append(logits_of(serial_stage(config, seeded(config)), tokens).sum().item())
    assert len(set(results)) == len(results)


def test_explicit_positions_that_count_up_equal_the_default():
    config = tiny_config()
    stage = serial_stage(config, seeded(config))
    tokens = torch.arange(24).reshape(2, 12)
    positions = torch.arange(12).expand(2, 12)
    torch.testing.assert_close(stage(tokens, 12, positions), stage(tokens, 12), rtol=0, atol=0)
