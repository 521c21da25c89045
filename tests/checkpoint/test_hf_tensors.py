"""A stored tensor described as runs of rows: reading its parts and reading its rows are each other's inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_folders import save_family, stored_tensors
from megatron.checkpoint import hf_export
from megatron.checkpoint.fused_qkv import RowRun, grouped_qkv, stacked
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.hf_export import plan_export, split_by_size, write_hf_folder
from megatron.checkpoint.hf_rules import LLAMA
from megatron.checkpoint.hf_tensors import StoredTensor
from megatron.checkpoint.hf_tensors import stored_tensors as describe
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig

COLUMNS = 7
RUNS: dict[str, tuple[RowRun, ...]] = {
    "one part": stacked({"q": 30}),
    "stacked": stacked({"q": 30, "k": 10, "v": 10}),
    "grouped": grouped_qkv(6, 2, 5),
}


def rectangle(tensor: Tensor, start, size) -> Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]


@pytest.mark.parametrize(
    ("columns", "is_transposed"),
    [((COLUMNS,), False), ((COLUMNS,), True), ((), False)],
    ids=["weight", "transposed weight", "bias"],
)
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_rows_made_of_parts_that_were_read_from_the_tensor_are_its_rows(runs, columns, is_transposed):
    described = StoredTensor("fused", runs, columns, is_transposed)
    stored = torch.randn(described.shape, generator=torch.Generator().manual_seed(0))

    def part(name, start, size):
        return described.read_part(name, start, size, lambda *at: rectangle(stored, *at))

    for first, num_rows in ((0, len(stored)), (3, 4), (len(stored) - 1, 1)):
        rows = described.read_rows(first, num_rows, part)
        assert rows.is_contiguous() and torch.equal(rows, stored[first : first + num_rows])


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_a_slice_of_a_part_touches_nothing_else(runs, is_transposed):
    described = StoredTensor("fused", runs, (COLUMNS,), is_transposed)
    stored = torch.zeros(described.shape)
    touched = 0

    def read(start, size):
        nonlocal touched
        touched += size[0] * size[1]
        return rectangle(stored, start, size)

    described.read_part("q", (8, 2), (9, 3), read)
    assert touched == 9 * 3


def test_a_tensor_without_a_place_is_an_error_that_names_it():
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=16, max_position_embeddings=4)
    with pytest.raises(CheckpointError) as error:
        describe(LLAMA, model, {"embedding.position.weight": (4, 8)})
    assert str(error.value) == (
        "embedding.position.weight has no place in Hugging Face's format of llama; "
        "keep the checkpoint in the native format."
    )


class Watched:
    """A source of which some entries have another dtype, and which remembers what it was asked for."""

    def __init__(self, source: HuggingFaceSource, dtypes: dict[str, torch.dtype]):
        self._source, self._dtypes = source, dtypes
        self.read_bytes: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes.get(name, self._source.dtype(name))

    def read(self, name: str, start, size) -> Tensor:
        part = self._source.read(name, start, size).to(self.dtype(name))
        self.read_bytes.append(part.nbytes)
        return part


def export(source, folder):
    plan = plan_export(source)
    write_hf_folder(
        source, plan, split_by_size(plan.tensors, 10**9), folder, other_files={}, on_bytes=lambda num_bytes: None
    )
    return stored_tensors(folder)


@pytest.mark.parametrize("name", ["falcon 40b", "gpt2"])
def test_an_export_reads_every_byte_once_and_little_at_a_time(name, tmp_path, monkeypatch):
    limit = 2000  # more than any row has: 156 numbers of 4 bytes
    monkeypatch.setattr(hf_export, "_ROWS_BYTES", limit)
    folder = save_family(tmp_path / "hf", name)
    source = Watched(HuggingFaceSource(folder), {})
    written, stored = export(source, tmp_path / "back"), stored_tensors(folder)
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    assert max(source.read_bytes) <= limit
    assert sum(source.read_bytes) == sum(tensor.nbytes for tensor in stored.values())


def test_parts_of_different_dtypes_are_fused_in_the_one_that_holds_all(tmp_path):
    folder = save_family(tmp_path / "hf", "falcon 40b", dtype=torch.bfloat16)
    dtypes = {"model.layers.1.attention.k.weight": torch.float32}
    written, stored = export(Watched(HuggingFaceSource(folder), dtypes), tmp_path / "back"), stored_tensors(folder)
    fused = "transformer.h.1.self_attention.query_key_value.weight"
    assert {name: tensor.dtype for name, tensor in written.items() if tensor.dtype != torch.bfloat16} == {
        fused: torch.float32
    }
    assert torch.equal(written[fused], stored[fused].float())
