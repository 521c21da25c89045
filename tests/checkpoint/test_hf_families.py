"""Every family, from a folder that transformers saved to one that transformers loads, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_folders import FAMILIES, load_family, loaded_config, save_family, stored_tensors
from megatron.checkpoint import hf_export
from megatron.checkpoint.fused_qkv import grouped_qkv, split_rows
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.hf_export import plan_export, split_by_size, write_hf_folder
from megatron.checkpoint.importing import import_weights
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.placement import logical_shapes
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.source import Source
from megatron.core.layout import ParallelLayout

NUM_TOKENS = 24
# With weights of this size attention is no choice of one position, and logits are small numbers.
STD = 0.15


def ignore(num_bytes: int) -> None:
    pass


def read_all(source: Source) -> dict[str, Tensor]:
    return {name: source.read(name, (0,) * len(source.shape(name)), source.shape(name)) for name in source.names()}


def to_hf(source: Source, folder: Path, **options) -> Path:
    export = plan_export(source, **options)
    write_hf_folder(source, export, split_by_size(export.tensors, 30_000), folder, other_files={}, on_bytes=ignore)
    return folder


def assert_same_folders(original: Path, returned: Path):
    theirs, ours = stored_tensors(original), stored_tensors(returned)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
    assert loaded_config(original) == loaded_config(returned)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_round_trip_gives_back_every_bit_and_an_equal_config(name, dtype, tmp_path):
    original = save_family(tmp_path / "hf", name, dtype=dtype, max_shard_size="20KB")
    source = HuggingFaceSource(original)
    import_weights(source, tmp_path / "native", model_name=name.split()[0], on_bytes=ignore)
    native = open_source(tmp_path / "native")
    assert native.model_config() == source.model_config()
    assert_same_folders(original, to_hf(native, tmp_path / "back"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_was_born_here_becomes_one_that_transformers_loads(name, tmp_path, monkeypatch):
    """Without a config.json to go by: the config is spelled anew, and means the same to transformers and to us."""
    original = save_family(tmp_path / "hf", name, std=STD)
    source = HuggingFaceSource(original)
    monkeypatch.setattr(hf_export, "carried_files", lambda source: {})
    monkeypatch.setattr(source, "model_name", lambda: name.split()[0])
    born = to_hf(source, tmp_path / "born")
    model, report = load_family(name, born, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == FAMILIES[name]["model_type"]
    tokens = torch.arange(NUM_TOKENS)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens)[0], load_family(name, original).eval()(tokens)[0])
    assert HuggingFaceSource(born).model_config() == source.model_config()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_entries_are_the_logical_tensors_of_the_model(name, tmp_path):
    source = HuggingFaceSource(save_family(tmp_path / "hf", name))
    shapes = {entry.removeprefix("model."): source.shape(entry) for entry in source.names()}
    assert shapes == logical_shapes(source.model_config())


@pytest.mark.parametrize(("name", "recorded"), [("llama", None), ("mistral", "mistral"), ("qwen2 window", "qwen2")])
def test_the_family_is_recorded_where_it_has_one_generation(name, recorded, tmp_path):
    assert HuggingFaceSource(save_family(tmp_path / "hf", name)).model_name() == recorded


@pytest.mark.parametrize("name", ["falcon 7b", "falcon 40b", "falcon sequential", "gpt2"])
def test_a_slice_of_a_fused_tensor_is_the_slice_of_the_whole_logical_tensor(name, tmp_path):
    source = HuggingFaceSource(save_family(tmp_path / "hf", name))
    for entry, whole in read_all(source).items():
        start, size = tuple(n // 3 for n in whole.shape), tuple((n + 1) // 2 for n in whole.shape)
        part = source.read(entry, start, size)
        assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
        assert torch.equal(part, whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]), entry


def test_falcon_groups_are_taken_apart(tmp_path):
    folder = save_family(tmp_path / "hf", "falcon 40b")
    fused = stored_tensors(folder)["transformer.h.1.self_attention.query_key_value.weight"]
    parts, source = split_rows(fused, grouped_qkv(8, 2, 6)), HuggingFaceSource(folder)
    for part, tensor in parts.items():
        assert torch.equal(source.read(f"model.layers.1.attention.{part}.weight", (0, 0), tensor.shape), tensor)


def test_gpt2_matrices_are_transposed_and_its_biases_are_not(tmp_path):
    folder = save_family(tmp_path / "hf", "gpt2 untied")
    stored, ours = stored_tensors(folder), read_all(HuggingFaceSource(folder))
    q, k, v = (ours[f"model.layers.2.attention.{part}.weight"] for part in "qkv")
    assert torch.equal(torch.cat((q, k, v)).t(), stored["transformer.h.2.attn.c_attn.weight"])
    biases = torch.cat([ours[f"model.layers.2.attention.{part}.bias"] for part in "qkv"])
    assert torch.equal(biases, stored["transformer.h.2.attn.c_attn.bias"])
    assert torch.equal(ours["model.layers.2.mlp.down.weight"].t(), stored["transformer.h.2.mlp.c_proj.weight"])


CHAIN = (
    (ParallelLayout(tp=2, pp=2), 1),
    (ParallelLayout(tp=4), 1),
    (ParallelLayout(pp=4), 2),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chain_of_layouts_ends_where_it_began(name, tmp_path):
    """hf -> megatron -> TP2 PP2 -> TP4 -> PP4 with two stages a rank -> hf."""
    layers = "n_layer" if name.startswith("gpt2") else "num_hidden_layers"
    original = save_family(tmp_path / "hf", name, dtype=torch.bfloat16, max_shard_size="20KB", **{layers: 8})
    folder = tmp_path / "native"
    import_weights(HuggingFaceSource(original), folder, model_name=name.split()[0], on_bytes=ignore)
    for layout, num_chunks in CHAIN:
        plan = plan_resharding(open_source(folder), layout, num_chunks=num_chunks)
        folder = tmp_path / f"{layout} {num_chunks}"
        iteration = reshard(plan, folder, on_bytes=ignore)
        assert len(list(iteration.glob("*.safetensors"))) == layout.world_size
    assert_same_folders(original, to_hf(open_source(folder), tmp_path / "back"))
