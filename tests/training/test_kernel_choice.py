"""Which attention kernel a run gets: the one it asks for where that computes what the run asks for."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging

import pytest
import torch

from megatron.model.attention_kernels import flash_attention, sdpa_attention
from megatron.training.run import choose_kernel
from small_run import small_run

CUDA = torch.device("cuda")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_flash_attn_is_used_where_it_is_asked_for_and_computes_windows_and_segments_too(
    installed: None,
) -> None:
    assert choose_kernel(small_run(bf16=None), CUDA) is sdpa_attention
    for more in ({}, {"sliding_window_size": 16}, {"reset_attention_mask": None}):
        assert choose_kernel(small_run(bf16=None, use_flash_attn=None, **more), CUDA) is flash_attention


@pytest.mark.parametrize(
    ("device", "more", "reason"),
    [
        ("cpu", {"bf16": None}, "flash-attn needs a GPU"),
        ("cuda", {}, "flash-attn needs --bf16"),
    ],
)
def test_where_it_cannot_be_the_reason_is_said(
    installed: None, caplog: pytest.LogCaptureFixture, device: str, more: dict[str, None], reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_kernel(small_run(use_flash_attn=None, **more), torch.device(device)) is sdpa_attention
    assert caplog.messages == [
        f"--use_flash_attn: {reason}; PyTorch's scaled_dot_product_attention is used instead",
    ]
