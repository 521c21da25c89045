"""Operations counted by formula against operations counted one by one."""

import pytest

from megatron.model.flops import flops_per_token
from megatron.model.presets import preset
from reference import tiny_config

SEQ_LENGTH = 512


@pytest.mark.parametrize("window", [None, 1, 100, SEQ_LENGTH, 10 * SEQ_LENGTH])
def test_attention_is_counted_for_the_keys_that_are_seen(window):
    """Forward 2 products of 2 operations for each pair and channel, and twice that backward."""
    config = tiny_config(sliding_window_size=window)
    pairs = sum(min(position + 1, window or SEQ_LENGTH) for position in range(SEQ_LENGTH))
    per_key = 12 * config.num_layers * config.num_attention_heads * config.kv_channels
    # Next to nothing is seen in a sequence of one token; the formula counts half a key there.
    attention = flops_per_token(config, SEQ_LENGTH) - flops_per_token(config, 1) + per_key / 2
    # The formula is the integral of the sum, which differs by less than half a key for each token.
    assert attention / per_key == pytest.approx(pairs / SEQ_LENGTH, abs=0.5)


def test_a_large_model_takes_six_operations_per_parameter():
    """And those of attention and of embedding rows that are only looked up."""
    config = preset("falcon", "40")
    assert flops_per_token(config, 2048) == pytest.approx(6 * 41.3e9, rel=0.05)
