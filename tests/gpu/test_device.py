"""What has to hold on a GPU. Every test has a twin on the CPU, which runs by default: only the device differs.

.venv/bin/python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from device_runs import Options, Trained, batches, step_on, train, with_dropout
from finetune_runs import assert_same_bits, command, run_command, stored_entries, write_tokens
from megatron.core.recompute import RecomputePolicy
from megatron.model.attention_kernels import AttentionKernel, AttentionPattern, flash_attention, sdpa_attention
from megatron.model.config import ModelConfig
from rank_process import REPOSITORY
from reference import tiny_config

ON_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch finds no GPU")],
)
RECOMPUTE = {
    "selective": RecomputePolicy("selective"),
    "uniform": RecomputePolicy("full", "uniform", 2),
    "block": RecomputePolicy("full", "block", 3),
}
# fp32 sums in another order (a GPU's attention adds its gradients in whatever order its blocks finish), and what Adam
# makes of them where a gradient is near its eps. TF32, which is off, would show at 1e-3.
FP32_TOLERANCE = 1e-4
# What one rounding to bf16 can change, relatively.
BF16_EPS = 2.0**-8
FULL, WINDOW = AttentionPattern(), AttentionPattern(window=40)


@pytest.fixture(params=["cpu", ON_GPU])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def nondeterministic_after() -> Iterator[None]:
    """--deterministic changes the process for good, and this one has other tests to run."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if before is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before


def assert_close(one: Trained, other: Trained, tolerance: float) -> None:
    assert one.losses == pytest.approx(other.losses, rel=tolerance)
    assert one.grad_norms == pytest.approx(other.grad_norms, rel=tolerance)
    for name, weight in one.weights.items():
        assert (weight - other.weights[name]).abs().max() <= tolerance * weight.abs().max(), name


def test_fp32_steps_are_those_of_the_cpu(device: str) -> None:
    config = tiny_config()
    assert_close(train("cpu", config, Options()), train(device, config, Options()), FP32_TOLERANCE)


def test_bf16_steps_follow_those_in_fp32_and_keep_fp32_masters(device: str) -> None:
    config = tiny_config()
    fp32 = train("cpu", config, Options(), num_steps=10)
    bf16 = train(device, config, Options(compute_dtype=torch.bfloat16), num_steps=10)
    assert {weight.dtype for weight in bf16.weights.values()} == {torch.float32}
    assert bf16.losses == pytest.approx(fp32.losses, rel=2 * BF16_EPS)
    assert bf16.losses != fp32.losses  # or it was fp32 after all
    # Updates of lr 1e-3 vanish in weights that are rounded to bf16 after every step; masters keep them.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in bf16.weights.values())


@pytest.mark.parametrize("heads_kv", [8, 2, 1])
def test_the_flash_backend_computes_attention(device: str, heads_kv: int) -> None:
    """sdpa_attention with every other backend of PyTorch forbidden."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        compare_attention(sdpa_attention, device, heads_kv)


@pytest.mark.parametrize("heads_kv", [8, 2])
def test_a_window_never_needs_all_scores_at_once(device: str, heads_kv: int) -> None:
    """Two blocks and a part of a third, with the backend forbidden that writes scores to memory."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        compare_attention(sdpa_attention, device, heads_kv, WINDOW, s=640)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="the flash-attn package is not installed")
@pytest.mark.parametrize("pattern", [FULL, WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("heads_kv", [8, 2, 1])
def test_the_flash_attn_package_computes_attention(heads_kv: int, pattern: AttentionPattern) -> None:
    compare_attention(flash_attention, "cuda", heads_kv, pattern)


def compare_attention(
    kernel: AttentionKernel, device: str, heads_kv: int, pattern: AttentionPattern = FULL, *, s: int = 128
) -> None:
    """Output and gradients against the definition in float64, from the same bf16 inputs."""
    b, n, d = 2, 8, 64
    generator = torch.Generator().manual_seed(0)
    shapes = [(s, b, n, d), (s, b, heads_kv, d), (s, b, heads_kv, d), (s, b, n, d)]
    drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    *inputs, weight = (x.to(device) for x in drawn)
    *exact_inputs, exact_weight = (x.double() for x in drawn)
    out = weighed(kernel, inputs, weight, pattern)
    expected = weighed(attention_by_definition, exact_inputs, exact_weight, pattern)
    for value, exact in zip(out, expected, strict=True):
        # Probabilities and results are rounded to bf16, and so is the sum over the query heads of a key head, head by
        # head: that many roundings of the largest value.
        num_roundings = 3 + n // heads_kv
        assert (value.cpu().double() - exact).abs().max() <= num_roundings * BF16_EPS * exact.abs().max()


def weighed(kernel: AttentionKernel, inputs: list[Tensor], weight: Tensor, pattern: AttentionPattern) -> list[Tensor]:
    """The output, and the gradients of its weighted sum."""
    q, k, v = (x.requires_grad_() for x in inputs)
    out = kernel(q, k, v, pattern, 0.0)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))]


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, dropout: float) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) / q.shape[3] ** 0.5
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
    hidden = ones.triu(1)
    if pattern.window is not None:
        hidden |= ones.tril(-pattern.window)
    return torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("policy", RECOMPUTE)
def test_recomputing_changes_nothing_but_memory_with_dropout_too(device: str, policy: str) -> None:
    config = with_dropout(tiny_config())
    kept = train(device, config, Options())
    recomputed = train(device, config, Options(recompute=RECOMPUTE[policy]))
    assert_close(kept, recomputed, 0.0 if device == "cpu" else FP32_TOLERANCE)
    if device == "cuda" and policy == "uniform":
        assert recomputed.peak_bytes < kept.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_stage_3_of_one_rank_trains_as_stage_0(device: str, dtype: torch.dtype) -> None:
    config = tiny_config()
    with step_on(device, config, Options(zero_stage=3)):
        assert dist.get_backend() == ("nccl" if device == "cuda" else "gloo")
    whole, sharded = (train(device, config, Options(dtype, zero_stage)) for zero_stage in (0, 3))
    # In bf16 the two engines round gradients at different places, and Adam's first steps see their signs.
    assert_close(whole, sharded, FP32_TOLERANCE if dtype == torch.float32 else 8 * BF16_EPS)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    device: str, tmp_path: Path, nondeterministic_after: None
) -> None:
    """With dropout and in bf16. On a GPU --deterministic is what makes it so."""
    data = write_tokens(tmp_path / "counting")
    flags = {"device": device, "bf16": None, "deterministic": None, "train_iters": 6}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for argv in (
        command(data, **flags, save=whole),
        command(data, **flags, save=parts, exit_interval=3),
        command(data, **flags, save=parts, load=parts),
    ):
        ending = run_command(argv)
        assert ending.status == 0, ending.err
    assert_same_bits(stored_entries(whole, 6), stored_entries(parts, 6))


@dataclass(frozen=True)
class Kernel:
    name: str
    calls: int
    time_us: float


@dataclass(frozen=True)
class StepReport:
    """One bf16 step: its peak memory and its kernels, the longest first. `peak_bytes` is 0 on the CPU."""

    hardware: str
    torch: str
    num_parameters: int
    peak_bytes: int
    kernels: list[Kernel]


def test_kernels_and_memory_of_a_step_are_reported(device: str, tmp_path: Path) -> None:
    """On a GPU the report goes to benchmarks/results, under the hardware's name."""
    is_gpu = device == "cuda"
    sizes = {"num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 2816, "max_position_embeddings": 1024}
    report = report_step(device, tiny_config(**(sizes if is_gpu else {})))
    folder = REPOSITORY / "benchmarks" / "results" if is_gpu else tmp_path
    file = folder / f"gpu_step_{re.sub(r'[^a-z0-9]+', '-', report.hardware.lower())}.json"
    file.write_text(json.dumps(asdict(report), indent=2) + "\n")
    assert report.kernels and all(kernel.calls > 0 for kernel in report.kernels)
    if is_gpu:
        assert any("flash" in kernel.name.lower() for kernel in report.kernels)
        # Masters, two moments and gradients in fp32, weights in bf16.
        assert report.peak_bytes >= report.num_parameters * (4 + 8 + 4 + 2)


def report_step(device: str, config: ModelConfig) -> StepReport:
    is_gpu = device == "cuda"
    with step_on(device, config, Options(compute_dtype=torch.bfloat16)) as step:
        inputs = batches(1, config, step.topology.device)
        step.run(inputs, iteration=1, lr=1e-3)  # allocates and initialises what later steps reuse
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as profiler:
            step.run(inputs, iteration=2, lr=1e-3)
            if is_gpu:
                torch.cuda.synchronize()
        num_parameters = sum(shard.tensor.numel() for shard in step.data_parallel.shards)
    time_of = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    kernels = [Kernel(row.key, row.count, float(getattr(row, time_of))) for row in profiler.key_averages()]
    return StepReport(
        hardware=torch.cuda.get_device_name() if is_gpu else "cpu",
        torch=torch.__version__,
        num_parameters=num_parameters,
        peak_bytes=torch.cuda.max_memory_allocated() if is_gpu else 0,
        kernels=sorted(kernels, key=lambda kernel: kernel.time_us, reverse=True)[:25],
    )
