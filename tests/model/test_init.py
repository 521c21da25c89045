"""Initial weights: every norm starts as the identity, and what writes to the residual stream starts small."""

import math

import pytest
import torch

from megatron.core.sharding import Region
from megatron.model.init import initial_value
from reference import BERT, FAMILIES, serial_stage, tiny_config


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_every_norm_of_every_family_starts_as_the_identity(family):
    """Up to epsilon, for an input of mean 0 and variance 1."""
    config = tiny_config(**{**FAMILIES, "bert": BERT}[family], num_layers=1, init_method_std=0.02)
    stage = serial_stage(config, lambda region: initial_value(config, 1, region))
    norms = [module for module in stage.modules() if type(module).__name__ == "Norm"]
    assert len(norms) >= 2
    for norm in norms:
        x = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(norm.weight.numel() // 2)
        torch.testing.assert_close(norm(x), x, rtol=1e-4, atol=0)


def test_weights_that_write_to_the_residual_stream_shrink_with_depth():
    config = tiny_config(num_layers=8)

    def spread(name):
        return initial_value(config, 1, Region(name, (64, 64), (0, 0), (64, 64), (0, 0))).std().item()

    for part in ("attention.output", "mlp.down"):
        # 4096 draws: their spread is within 5% of the distribution's.
        assert spread(f"layers.3.{part}.weight") == pytest.approx(0.2 / math.sqrt(16), rel=0.05)
    assert spread("layers.3.mlp.up.weight") == pytest.approx(0.2, rel=0.05)
