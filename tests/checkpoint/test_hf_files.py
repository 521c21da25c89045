"""The files of a Hugging Face folder as they come: pickled weights, names without prefix, buffers, tied copies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_folders import edit_json, save_family, stored_tensors
from megatron.checkpoint import hf_files
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.hf_files import PICKLED_INDEX_FILE, WeightFiles
from megatron.checkpoint.source import Source
from megatron.errors import CheckpointError


def read_all(source: Source) -> dict[str, Tensor]:
    return {name: source.read(name, (0,) * len(source.shape(name)), source.shape(name)) for name in source.names()}


def assert_same_weights(a: Source, b: Source):
    ours, theirs = read_all(a), read_all(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def pickled(folder: Path, to: Path, *, num_shards: int = 1, zipped: bool = True) -> Path:
    """The same model in files of torch.save, as transformers 4 wrote them."""
    tensors = list(stored_tensors(folder).items())
    to.mkdir()
    shutil.copy(folder / "config.json", to)
    names = ["pytorch_model.bin"]
    if num_shards > 1:
        names = [f"pytorch_model-{i:05d}-of-{num_shards:05d}.bin" for i in range(1, num_shards + 1)]
    for i, name in enumerate(names):
        torch.save(dict(tensors[i::num_shards]), to / name, _use_new_zipfile_serialization=zipped)
    if num_shards > 1:
        weight_map = {name: names[i % num_shards] for i, (name, _) in enumerate(tensors)}
        (to / PICKLED_INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return to


@pytest.mark.parametrize("name", ["llama", "falcon 40b", "gpt2"])
@pytest.mark.parametrize(("num_shards", "zipped"), [(1, True), (1, False), (3, True)])
def test_pickled_weights_are_those_of_safetensors(name, num_shards, zipped, tmp_path):
    folder = save_family(tmp_path / "safe", name, dtype=torch.bfloat16)
    assert_same_weights(
        HuggingFaceSource(pickled(folder, tmp_path / "bin", num_shards=num_shards, zipped=zipped)),
        HuggingFaceSource(folder),
    )


def test_a_slice_of_a_pickled_tensor_holds_no_more_than_itself(tmp_path):
    source = HuggingFaceSource(pickled(save_family(tmp_path / "safe", "llama"), tmp_path / "bin"))
    part = source.read("model.layers.1.mlp.up.weight", (2, 3), (4, 5))
    assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
    part.zero_()
    assert source.read("model.layers.1.mlp.up.weight", (2, 3), (4, 5)).count_nonzero() > 0


def test_a_pickled_file_is_mapped_anew_when_much_of_it_was_read(tmp_path, monkeypatch):
    source = HuggingFaceSource(pickled(save_family(tmp_path / "safe", "llama"), tmp_path / "bin"))
    torch_file, opened = hf_files.TorchFile, []
    monkeypatch.setattr(hf_files, "TorchFile", lambda file: opened.append(file) or torch_file(file))
    monkeypatch.setattr(hf_files, "_MAX_MAPPED_BYTES", 1000)
    for row in range(10):  # rows of 48 numbers of 4 bytes: after the sixth 1000 bytes have been read
        source.read("model.layers.0.mlp.up.weight", (row, 0), (1, 48))
    assert len(opened) == 2


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_parts_of_rows_are_read_from_a_few_rows_at_a_time(form, tmp_path, monkeypatch):
    """A column touches the pages of every row, which would make the whole tensor count as memory."""
    folder = save_family(tmp_path / "safe", "gpt2")
    source = HuggingFaceSource(folder if form == "safetensors" else pickled(folder, tmp_path / "bin"))
    whole = stored_tensors(folder)["transformer.h.0.mlp.c_fc.weight"].t()
    read, spans = WeightFiles._read_slice, []

    def counted(self, tensor, start, size, row_bytes):
        spans.append(size[0] * row_bytes)
        return read(self, tensor, start, size, row_bytes)

    monkeypatch.setattr(WeightFiles, "_read_slice", counted)
    monkeypatch.setattr(hf_files, "_MAX_SPANNED_BYTES", 5000)
    part = source.read("model.layers.0.mlp.up.weight", (20, 3), (100, 41))
    assert torch.equal(part, whole[20:120, 3:44])
    assert len(spans) > 5 and max(spans) <= 5000


def test_tensors_that_share_their_storage_are_read(tmp_path):
    """As transformers 4 pickled a tied head: one storage, two names."""
    folder = pickled(save_family(tmp_path / "safe", "llama 3.2"), tmp_path / "bin")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_same_weights(HuggingFaceSource(folder), HuggingFaceSource(tmp_path / "safe"))


def test_safetensors_count_before_pickled_files(tmp_path):
    folder = save_family(tmp_path / "safe", "llama")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert "model.head.weight" in HuggingFaceSource(folder).names()


def test_a_missing_shard_in_the_middle_is_named(tmp_path):
    folder = pickled(save_family(tmp_path / "safe", "llama"), tmp_path / "bin", num_shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    assert message_of(folder) == (
        f"{folder / PICKLED_INDEX_FILE} names pytorch_model-00002-of-00003.bin, which is missing in {folder}; "
        "download the missing files."
    )


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    folder = pickled(save_family(tmp_path / "safe", "llama"), tmp_path / "bin", num_shards=3)
    index = folder / PICKLED_INDEX_FILE
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "lm_head.weight": "../safe/model.safetensors"}}))
    assert message_of(folder) == (f"{index} names ../safe/model.safetensors, outside of its folder; download it again.")


class Command:
    def __init__(self, canary: Path):
        self._canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self._canary),)


def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(tmp_path):
    folder = pickled(save_family(tmp_path / "safe", "llama"), tmp_path / "bin")
    torch.save({"lm_head.weight": Command(tmp_path / "canary")}, folder / "pytorch_model.bin")
    message = message_of(folder)
    assert message.startswith(f"{folder / 'pytorch_model.bin'} names posix.mkdir, which is no ")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}])
def test_a_pickle_of_something_else_is_refused(content, tmp_path):
    folder = pickled(save_family(tmp_path / "safe", "llama"), tmp_path / "bin")
    torch.save(content, folder / "pytorch_model.bin")
    assert message_of(folder).startswith(f"{folder / 'pytorch_model.bin'} holds no tensors; ")


def test_a_pickled_file_that_was_cut_off_is_named(tmp_path):
    folder = pickled(save_family(tmp_path / "safe", "llama"), tmp_path / "bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:5000])
    assert message_of(folder).startswith(f"{file} is damaged or no file of torch.save (")


def test_names_without_the_prefix_are_read_too(tmp_path):
    """As GPT-2 lies on the hub: the model without its head, and masks as buffers of every layer."""
    folder = save_family(tmp_path / "hf", "gpt2")
    bare = shutil.copytree(folder, tmp_path / "bare")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored_tensors(folder).items()}
    assert all(not name.startswith("transformer.") for name in tensors)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    buffers = {f"h.{i}.attn.bias": mask.clone() for i in range(4)}
    buffers |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(4)}
    save_file({**tensors, **buffers}, bare / "model.safetensors", {"format": "pt"})
    assert_same_weights(HuggingFaceSource(bare), HuggingFaceSource(folder))


def test_a_name_that_is_there_twice_is_no_guess(tmp_path):
    folder = save_family(tmp_path / "hf", "gpt2")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "wpe.weight": torch.zeros(64, 48)}, file, {"format": "pt"})
    assert "wpe.weight in model.safetensors has no place in the model" in message_of(folder)


def test_berts_old_names_copies_and_buffers_are_read(tmp_path):
    """As bert-base-uncased lies on the hub."""
    folder = save_family(tmp_path / "hf", "bert")
    old = shutil.copytree(folder, tmp_path / "old")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored_tensors(folder).items()
    }
    copies = {
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
        "bert.embeddings.position_ids": torch.arange(64)[None],
    }
    save_file({**tensors, **copies}, old / "model.safetensors", {"format": "pt"})
    edit_json(old / "config.json", architectures=["BertForMaskedLM"])
    assert_same_weights(HuggingFaceSource(old), HuggingFaceSource(folder))

    copies["cls.predictions.decoder.bias"][3] += 1
    save_file({**tensors, **copies}, old / "model.safetensors", {"format": "pt"})
    assert "holds cls.predictions.decoder.bias, which differs from cls.predictions.bias, but " in message_of(old)


def test_a_bert_without_one_of_its_heads_is_named(tmp_path):
    folder = save_family(tmp_path / "hf", "bert")
    kept = {name: tensor for name, tensor in stored_tensors(folder).items() if "seq_relationship" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert "cls.seq_relationship.weight is missing; cls.seq_relationship.bias is missing" in message_of(folder)


@pytest.mark.parametrize("name", ["falcon 7b", "gpt2", "gemma", "qwen3 tied"])
def test_a_tied_head_that_is_stored_must_be_the_embedding(name, tmp_path):
    folder = save_family(tmp_path / "hf", name)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = next(n for n in tensors if n.endswith(("wte.weight", "word_embeddings.weight", "embed_tokens.weight")))
    expected = read_all(HuggingFaceSource(folder)).keys()
    save_file({**tensors, "lm_head.weight": tensors[embedding].clone()}, file, {"format": "pt"})
    assert HuggingFaceSource(folder).names() == list(expected)
    save_file({**tensors, "lm_head.weight": -tensors[embedding]}, file, {"format": "pt"})
    assert f"{file} holds lm_head.weight, which differs from {embedding}, but " in message_of(folder)


def message_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        HuggingFaceSource(folder)
    return str(error.value)
