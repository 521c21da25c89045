"""What is saved in the background is copied from the device as it was, into pinned memory where that is a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron.checkpoint.snapshot import HostBuffers
from megatron.checkpoint.source import LocalTensor
from megatron.core.sharding import Region

ON_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch finds no GPU")],
)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_a_snapshot_has_the_values_before_the_updates_that_are_queued_behind_it(device: str) -> None:
    shape = (2048, 1024)
    live = torch.arange(float(2048 * 1024), device=device).reshape(shape)
    held = [LocalTensor("model", [Region("w", shape, (0, 0), shape, (0, 0))], live)]
    before = live.cpu().clone()
    buffers = HostBuffers(held)
    for _ in range(3):
        (copy,) = buffers.copy(held)
        for _ in range(20):
            live.add_(1.0)
        assert torch.equal(copy.tensor, before)
        assert copy.tensor.device.type == "cpu" and copy.tensor.is_pinned() == (device == "cuda")
        before += 20.0
