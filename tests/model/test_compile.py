"""`compile` changes how a stage computes and nothing else, and compiles once."""

import pytest
import torch

from distributed import run_distributed
from megatron.core.data_parallel import DataParallelConfig
from megatron.core.layout import ParallelLayout
from megatron.core.recompute import RecomputePolicy
from megatron.core.topology import Axis, Topology
from megatron.model.stage import Stage, StageOptions
from megatron.training.build import build_parts, fill_weights
from reference import fill_stage, seeded, tiny_config

SEQ_LENGTH = 12


def tokens_of(seed, vocab_size):
    return torch.randint(vocab_size, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(seed))


def gradients(stage, tokens):
    """Logits, and the gradients of a fixed weighting of them."""
    logits = stage(tokens, SEQ_LENGTH)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * weights.to(logits.dtype)).sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in stage.parameters())]


def stage_of(config, dtype, *, compile):
    options = StageOptions(padded_vocab_size=config.vocab_size, compile=compile)
    stage = Stage(config, range(config.num_layers), is_first=True, is_last=True, axis=Axis("tp"), options=options)
    return fill_stage(stage.to(dtype), Axis("tp"), seeded(config))


# float32: 2 layers of sums of at most 64 products lose fewer than two of seven digits.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_compiled_stage_computes_what_the_eager_one_does(dtype, tolerance):
    config = tiny_config(num_layers=2, vocab_size=64)
    tokens = tokens_of(1, config.vocab_size)
    eager, compiled = (gradients(stage_of(config, dtype, compile=compile), tokens) for compile in (False, True))
    for expected, actual in zip(eager, compiled, strict=True):
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


OTHERS = {
    "layer norm and biases": {"use_rms_norm": False, "qkv_bias": True, "glu_activation": "geglu"},
    "head norms, 1 + weight": {
        "num_attention_heads_kv": 8,  # queries and keys of one shape need one graph
        "qk_layernorm": True,
        "apply_layernorm_1p": True,
        "scale_embeddings": True,
        "glu_activation": "geglu_tanh",
        "sliding_window_size": 3,
    },
    "side by side": {"use_rms_norm": False, "glu_activation": None, "parallel_attn": True, "parallel_layernorm": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_other_families_have_compiles_too(name):
    config = tiny_config(num_layers=1, vocab_size=64, **OTHERS[name])
    tokens = tokens_of(1, config.vocab_size)
    eager, compiled = (gradients(stage_of(config, torch.float64, compile=compile), tokens) for compile in (False, True))
    for expected, actual in zip(eager, compiled, strict=True):
        assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def sharded_losses(compile):
    """Sums of logits of two micro-batches under ZeRO-3 with full recomputation, and the gradients they leave."""
    topology = Topology.create(ParallelLayout(dp=2))
    config = tiny_config(num_layers=2, vocab_size=64)
    options = StageOptions(padded_vocab_size=64, recompute=RecomputePolicy("full", "uniform", 1), compile=compile)
    parts = build_parts(config, topology, options, DataParallelConfig(zero_stage=3), master_dtype=torch.float64)
    fill_weights(parts.data_parallel, topology, seeded(config))
    losses = []
    for microbatch in range(2):
        # Whatever was compiled for the first micro-batch has to serve the second.
        stance = "fail_on_recompile" if compile and microbatch else "default"
        with torch.compiler.set_stance(stance):
            loss = parts.stages[0](tokens_of(10 * topology.dp.rank + microbatch, 64), SEQ_LENGTH).square().mean()
            parts.data_parallel.prepare_backward(0, is_last=microbatch == 1)
            loss.backward()
        losses.append(loss.item())
    parts.data_parallel.finish_gradients()
    return losses, [shard.gradient.clone() for shard in parts.data_parallel.shards]


def test_compiled_layers_run_under_zero_3_and_recomputation_without_compiling_again():
    eager, compiled = (run_distributed(sharded_losses, 2, compile, timeout_s=240) for compile in (False, True))
    for (losses, grads), (compiled_losses, compiled_grads) in zip(eager, compiled, strict=True):
        assert compiled_losses == pytest.approx(losses, rel=1e-12)
        for expected, actual in zip(grads, compiled_grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
