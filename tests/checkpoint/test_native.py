"""A rank reads the blocks that its own rectangles lie in, each once, and nothing else of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from checkpoint_samples import blank_like, held_by, save_from_one_process, whole_tensors
from megatron.checkpoint.container import parse_header
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.source import LocalTensor, load_tensors
from megatron.core.layout import ParallelLayout

BLOCK = 512


def blocks_of(source: NativeSource, held: list[LocalTensor]) -> set[int]:
    """The blocks of the one file in which the rows of the wanted rectangles lie, from the header alone."""
    ((name, record),) = source.manifest.files.items()
    stored = parse_header((source.path / name).read_bytes()[: record.header_bytes])
    blocks: set[int] = set()
    for local in held:
        for region in local.regions:
            tensor = stored[local.entry(region)]
            first = tensor.offset + region.start[0] * tensor.row_bytes
            blocks.update(range(first // BLOCK, -(-(first + region.size[0] * tensor.row_bytes) // BLOCK)))
    return blocks


@pytest.mark.parametrize("tp_rank", range(4))
def test_a_tensor_rank_reads_the_blocks_of_its_own_rows_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp_rank: int
) -> None:
    """Of a matrix that is cut by columns it needs a part of every row, so that all its blocks count as its own."""
    layout = ParallelLayout(tp=4)
    source = NativeSource(save_from_one_process(tmp_path, ParallelLayout(), block_bytes=BLOCK))
    ((_, record),) = source.manifest.files.items()
    expected = held_by(layout, tp_rank, whole_tensors(), by_rows=False)
    wanted = blocks_of(source, expected)
    offsets: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    loaded = blank_like(expected)
    load_tensors(source, loaded)
    assert all(torch.equal(one.tensor, other.tensor) for one, other in zip(loaded, expected, strict=True))
    assert offsets[0] == 0  # the header
    assert sorted(offsets[1:]) == [record.header_bytes + block * BLOCK for block in sorted(wanted)]
    assert len(wanted) < len(record.block_crc32)
