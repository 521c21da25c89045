"""Hugging Face -> native -> Hugging Face gives everything back, a few rows at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from stat import S_ISDIR

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_folders import VARIANTS, loaded_config, save_llama, stored_tensors
from megatron.checkpoint import hf_export
from megatron.checkpoint.commit import sweep
from megatron.checkpoint.fused_qkv import RowRun
from megatron.checkpoint.hf import HuggingFaceSource, carried_files
from megatron.checkpoint.hf_export import (
    HuggingFaceTensor,
    plan_export,
    split_by_number,
    split_by_size,
    write_hf_folder,
)
from megatron.checkpoint.hf_tensors import StoredTensor
from megatron.checkpoint.importing import import_weights
from megatron.checkpoint.manager import save
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.placement import logical_shapes
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, RunState, Source
from megatron.core.sharding import Block, ShardSpec
from megatron.core.topology import Axis
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig
from megatron.model.presets import family_defaults

ALL = 10**12
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def ignore(num_bytes: int) -> None:
    pass


def to_native(folder, root, **options):
    import_weights(HuggingFaceSource(folder), root, model_name="llama2", on_bytes=ignore, **options)
    return open_source(root)


def to_hf(source: Source, folder, *, max_shard_bytes=ALL, other_files=None, **options):
    export = plan_export(source, **options)
    shards = split_by_size(export.tensors, max_shard_bytes)
    write_hf_folder(source, export, shards, folder, other_files=other_files or {}, on_bytes=ignore)
    return folder


def save_training_checkpoint(root, model: ModelConfig, tensors: dict[str, Tensor], *, bf16: bool, **config):
    """As a run saves: two tensor ranks' halves of the embedding, fp32, with optimizer state beside the weights."""
    state = RunState(iteration=7, config={"training": {"bf16": bf16}, **config})
    locals_ = []
    for name, tensor in tensors.items():
        spec = ShardSpec((Block(name, tuple(tensor.shape), units=tensor.shape[0]),), dim=0)
        locals_ += [LocalTensor(kind, spec.regions(0, 1), tensor) for kind in ("model", "optimizer.exp_avg")]
    save(root, CheckpointInfo(state, model, "llama2"), locals_, Axis("world"))
    return open_source(root)


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_round_trip_gives_back_every_bit_and_an_equal_config(variant, dtype, tmp_path):
    original = save_llama(tmp_path / "hf", dtype=dtype, max_shard_size="20KB", **VARIANTS[variant])
    native = to_native(original, tmp_path / "native")
    returned = to_hf(native, tmp_path / "back", max_shard_bytes=30_000)
    assert_same_tensors(stored_tensors(original), stored_tensors(returned))
    assert loaded_config(original) == loaded_config(returned)
    assert (original / "generation_config.json").exists()
    assert json.loads((returned / "generation_config.json").read_text()) == json.loads(
        (original / "generation_config.json").read_text()
    )
    assert native.model_config() == HuggingFaceSource(original).model_config()


def test_tensors_of_different_dtypes_keep_theirs(tmp_path):
    torch.manual_seed(0)
    original = save_llama(tmp_path / "hf", dtype=BF16)
    model = LlamaForCausalLM.from_pretrained(original)
    model.model.norm.float()
    model.save_pretrained(original)
    returned = to_hf(to_native(original, tmp_path / "native"), tmp_path / "back")
    assert {t.dtype for t in stored_tensors(returned).values()} == {BF16, FP32}
    assert_same_tensors(stored_tensors(original), stored_tensors(returned))
    assert loaded_config(original) == loaded_config(returned)


def test_transformers_loads_an_export_without_missing_or_unexpected_tensors(tmp_path):
    original = save_llama(tmp_path / "hf", tie_word_embeddings=True)
    returned = to_hf(to_native(original, tmp_path / "native"), tmp_path / "back", max_shard_bytes=20_000)
    model, report = LlamaForCausalLM.from_pretrained(returned, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, LlamaForCausalLM.from_pretrained(original)(tokens).logits)


def test_a_dtype_that_is_asked_for_on_the_way_in_is_stated_on_the_way_out(tmp_path):
    original = save_llama(tmp_path / "hf", dtype=FP32)
    native = to_native(original, tmp_path / "native", dtype=BF16)
    returned = to_hf(native, tmp_path / "back")
    expected = {name: tensor.to(BF16) for name, tensor in stored_tensors(original).items()}
    assert_same_tensors(stored_tensors(returned), expected)
    assert loaded_config(returned) == {**loaded_config(original), "dtype": "bfloat16"}


def test_a_dtype_that_is_asked_for_on_the_way_out_is_written_and_stated(tmp_path):
    original = save_llama(tmp_path / "hf", dtype=FP32)
    returned = to_hf(to_native(original, tmp_path / "native"), tmp_path / "back", dtype=FP16)
    assert {tensor.dtype for tensor in stored_tensors(returned).values()} == {FP16}
    assert loaded_config(returned)["dtype"] == "float16"


@pytest.mark.parametrize(("bf16", "dtype", "stated"), [(True, BF16, "bfloat16"), (False, FP32, "float32")])
def test_the_master_weights_of_a_run_become_what_the_run_computed_in(bf16, dtype, stated, tmp_path):
    original = save_llama(tmp_path / "hf", dtype=FP16)
    source = HuggingFaceSource(original)
    tensors = {n.removeprefix("model."): read_whole(source, n).float() + 1 for n in source.names()}
    run = save_training_checkpoint(tmp_path / "run", source.model_config(), tensors, bf16=bf16, **carried_files(source))
    returned = to_hf(run, tmp_path / "back")
    expected = {name: (tensor.float() + 1).to(dtype) for name, tensor in stored_tensors(original).items()}
    assert_same_tensors(stored_tensors(returned), expected)
    assert loaded_config(returned) == {**loaded_config(original), "dtype": stated}


def test_a_model_born_here_becomes_one_that_transformers_loads(tmp_path):
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 37}
    model = ModelConfig(**{**family_defaults("llama2"), **sizes, "max_position_embeddings": 32})
    tensors = {name: torch.randn(shape) for name, shape in logical_shapes(model).items()}
    run = save_training_checkpoint(tmp_path / "run", model, tensors, bf16=False)
    folder = to_hf(run, tmp_path / "hf", special_tokens={"eos_token_id": 5})
    loaded, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.eos_token_id == 5
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, tensors["layers.1.mlp.down.weight"])
    assert HuggingFaceSource(folder).model_config() == model


def test_an_incomplete_checkpoint_is_not_exported(tmp_path):
    original = save_llama(tmp_path / "hf")
    source = HuggingFaceSource(original)
    tensors = {n.removeprefix("model."): read_whole(source, n) for n in source.names()}
    del tensors["final_norm.weight"]
    run = save_training_checkpoint(tmp_path / "run", source.model_config(), tensors, bf16=False)
    with pytest.raises(CheckpointError, match=r"lacks model\.final_norm\.weight; export a complete checkpoint\."):
        plan_export(run)


class CountingSource:
    """A source that remembers how much each read asked for."""

    def __init__(self, source: Source):
        self._source = source
        self.read_bytes: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        part = self._source.read(name, start, size)
        self.read_bytes.append(part.nbytes)
        return part


def test_an_export_reads_every_byte_once_and_few_rows_at_a_time(tmp_path, monkeypatch):
    limit = 1000
    monkeypatch.setattr(hf_export, "_ROWS_BYTES", limit)
    original = save_llama(tmp_path / "hf")
    native = CountingSource(to_native(original, tmp_path / "native"))
    returned = to_hf(native, tmp_path / "back")
    assert max(native.read_bytes) <= limit
    stored = stored_tensors(original)
    assert sum(native.read_bytes) == sum(tensor.nbytes for tensor in stored.values())
    assert_same_tensors(stored, stored_tensors(returned))


def test_an_import_reads_one_tensor_at_a_time_each_once(tmp_path, monkeypatch):
    original = save_llama(tmp_path / "hf")
    reads: list[tuple[str, tuple[int, ...]]] = []
    read = HuggingFaceSource.read

    def counted(self, name, start, size):
        reads.append((name, tuple(size)))
        return read(self, name, start, size)

    monkeypatch.setattr(HuggingFaceSource, "read", counted)
    heard: list[int] = []
    source = HuggingFaceSource(original)
    import_weights(source, tmp_path / "native", model_name="llama2", on_bytes=heard.append)
    assert sorted(reads) == sorted((name, source.shape(name)) for name in source.names())
    assert sum(heard) == sum(tensor.nbytes for tensor in stored_tensors(original).values())


def test_shards_are_files_as_transformers_names_and_marks_them(tmp_path):
    original = save_llama(tmp_path / "hf", max_shard_size="20KB")
    returned = to_hf(HuggingFaceSource(original), tmp_path / "back", max_shard_bytes=20_000)
    index = json.loads((returned / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored_tensors(original).values())
    for file in files:
        with safe_open(returned / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {name for name, f in index["weight_map"].items() if f == file} == set(opened.keys())


def tensors_of(*num_bytes: int) -> list[HuggingFaceTensor]:
    return [
        HuggingFaceTensor(StoredTensor(str(i), (RowRun("", 0, 0, n),), ()), torch.uint8)
        for i, n in enumerate(num_bytes)
    ]


def sizes_of(shards: list[list[HuggingFaceTensor]]) -> list[list[int]]:
    return [[tensor.num_bytes for tensor in shard] for shard in shards]


def test_shards_of_a_size_are_filled_in_order_and_a_larger_tensor_stands_alone():
    assert sizes_of(split_by_size(tensors_of(4, 4, 4, 20, 1, 9), 10)) == [[4, 4], [4], [20], [1, 9]]


@pytest.mark.parametrize("num_shards", range(1, 9))
def test_a_number_of_shards_is_met_exactly_in_order_and_none_is_empty(num_shards):
    for tensors in (
        tensors_of(100, 1, 1, 1, 1, 1, 1, 1),
        tensors_of(1, 1, 1, 1, 1, 1, 1, 100),
        tensors_of(*range(1, 9)),
    ):
        shards = split_by_number(tensors, num_shards)
        assert len(shards) == num_shards and all(shards)
        assert [tensor for shard in shards for tensor in shard] == tensors


def test_a_number_of_equal_shards_is_balanced():
    assert sizes_of(split_by_number(tensors_of(*[5] * 6), 3)) == [[5, 5]] * 3


@pytest.mark.parametrize("num_shards", [0, 3])
def test_a_number_of_shards_that_cannot_be_had_is_refused(num_shards):
    with pytest.raises(ConfigError) as error:
        split_by_number(tensors_of(1, 1), num_shards)
    assert str(error.value) == f"--num_output_shards {num_shards} cannot be had from 2 tensors; use 1 to 2."


def test_nothing_is_written_over(tmp_path):
    original = save_llama(tmp_path / "hf")
    with pytest.raises(CheckpointError) as error:
        to_hf(HuggingFaceSource(original), original)
    assert str(error.value) == f"{original} exists and is not an empty folder; choose another or remove it."
    with pytest.raises(CheckpointError) as error:
        to_native(original, original)
    assert str(error.value) == f"{original} exists and is not an empty folder; choose another or remove it."


def test_an_export_that_fails_leaves_nothing(tmp_path):
    original = save_llama(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"cannot be written \(No such file or directory\); choose a folder"):
        to_hf(HuggingFaceSource(original), tmp_path / "back", other_files={"tokenizer.json": tmp_path / "absent"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_every_file_and_name_of_an_export_is_on_the_disk_before_it_returns(tmp_path, monkeypatch):
    source = HuggingFaceSource(save_llama(tmp_path / "hf"))
    (tmp_path / "vocabulary").write_text("{}")
    on_disk: dict[int, int] = {}  # inode -> bytes or names that it had when it was synced

    def record(descriptor: int) -> None:
        status = os.fstat(descriptor)
        on_disk[status.st_ino] = len(os.listdir(descriptor)) if S_ISDIR(status.st_mode) else status.st_size

    monkeypatch.setattr(os, "fsync", record)
    files = {"tokenizer.json": tmp_path / "vocabulary"}
    folder = to_hf(source, tmp_path / "new" / "back", max_shard_bytes=30_000, other_files=files)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} < names and len(names) > 5
    for path in folder.iterdir():
        assert on_disk[path.stat().st_ino] == path.stat().st_size > 0
    for parent, num_names in ((folder, len(names)), (folder.parent, 1), (tmp_path, 3)):
        assert on_disk[parent.stat().st_ino] == num_names


@pytest.mark.parametrize("kind", ["current", "link", "link to nothing"])
def test_an_export_goes_where_a_short_path_or_a_link_leads(kind, tmp_path, monkeypatch):
    original = save_llama(tmp_path / "hf")
    target = tmp_path / "there"
    if kind != "link to nothing":
        target.mkdir()
    folder = Path(".") if kind == "current" else tmp_path / "link"
    if kind == "current":
        monkeypatch.chdir(target)
    else:
        folder.symlink_to(target)
    to_hf(HuggingFaceSource(original), folder)
    assert_same_tensors(stored_tensors(folder), stored_tensors(original))
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in folder.iterdir())
    assert folder.is_symlink() == (kind != "current")


def test_a_folder_that_existed_is_empty_again_after_an_export_that_fails(tmp_path):
    original = save_llama(tmp_path / "hf")
    (tmp_path / "back").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be written \(No such file or directory\); choose a folder"):
        to_hf(HuggingFaceSource(original), tmp_path / "back", other_files={"tokenizer.json": tmp_path / "absent"})
    assert not list((tmp_path / "back").iterdir())


def test_a_run_that_sweeps_its_folder_meanwhile_does_not_take_the_export_away(tmp_path):
    original = save_llama(tmp_path / "hf")
    source = HuggingFaceSource(original)
    export = plan_export(source)
    shards = split_by_number(export.tensors, 2)
    write_hf_folder(source, export, shards, tmp_path / "back", other_files={}, on_bytes=lambda _: sweep(tmp_path))
    assert_same_tensors(stored_tensors(tmp_path / "back"), stored_tensors(original))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf"]


def test_an_import_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    original = save_llama(tmp_path / "hf")
    (original / "tokenizer.model").write_bytes(b"pieces")
    source = HuggingFaceSource(original)
    (original / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_weights(source, tmp_path / "native", model_name="llama2", on_bytes=ignore)
    assert not [path for path in (tmp_path / "native").iterdir() if not path.name.startswith(".")]


def test_the_tokenizer_travels_with_the_weights(tmp_path):
    original = save_llama(tmp_path / "hf")
    (original / "tokenizer.model").write_bytes(b"pieces")
    (original / "tokenizer_config.json").write_text("{}")
    native = to_native(original, tmp_path / "native")
    recorded = native.tokenizer()
    assert dataclasses.astuple(recorded) == (
        "SentencePieceTokenizer",
        str(tmp_path / "native" / "tokenizer" / "tokenizer.model"),
        hashlib.sha256(b"pieces").hexdigest(),
    )
    assert (tmp_path / "native" / "tokenizer" / "tokenizer_config.json").exists()


def read_whole(source: Source, name: str) -> Tensor:
    shape = source.shape(name)
    return source.read(name, (0,) * len(shape), shape)
