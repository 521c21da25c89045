"""A Hugging Face folder as a source: every slice is the slice of the stored tensor, every defect is named at once."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_folders import SIZES, VARIANTS, edit_json, save_llama, stored_tensors
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.hf_family import module_and_layer
from megatron.checkpoint.hf_files import INDEX_FILE, WeightFiles
from megatron.checkpoint.hf_rules import LLAMA
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.placement import logical_shapes
from megatron.checkpoint.source import LocalTensor, load_tensors
from megatron.core.sharding import Block, ShardSpec
from megatron.errors import CheckpointError

UP = "model.layers.1.mlp.up.weight"
HF_UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "sharded", max_shard_size="20KB")


@pytest.fixture
def sharded(pristine, tmp_path):
    """A folder of several files, to damage."""
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture
def single(tmp_path):
    return save_llama(tmp_path / "model")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_every_tensor_of_the_model_is_read_bit_for_bit(variant, max_shard_size, tmp_path):
    folder = save_llama(tmp_path / "m", max_shard_size=max_shard_size, dtype=torch.bfloat16, **VARIANTS[variant])
    source, stored = HuggingFaceSource(folder), stored_tensors(folder)
    assert len(source.names()) == len(stored)
    for name in source.names():
        tensor = stored.pop(llama_name(name.removeprefix("model.")))
        assert (source.shape(name), source.dtype(name)) == (tensor.shape, torch.bfloat16)
        assert torch.equal(source.read(name, (0,) * tensor.dim(), tensor.shape), tensor)
    assert not stored


def test_the_entries_are_the_logical_tensors_that_the_model_declares(single):
    source = HuggingFaceSource(single)
    assert {name.removeprefix("model.") for name in source.names()} == logical_shapes(source.model_config()).keys()


@pytest.mark.parametrize(
    ("start", "size"),
    [((0, 0), (44, 36)), ((5, 0), (7, 36)), ((0, 9), (44, 18)), ((43, 35), (1, 1)), ((3, 2), (20, 5))],
)
def test_a_slice_is_the_slice_of_the_whole(sharded, start, size):
    whole = stored_tensors(sharded)[HF_UP]
    part = HuggingFaceSource(sharded).read(UP, start, size)
    assert torch.equal(part, whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]])
    assert part.is_contiguous()


def test_a_slice_is_a_copy_that_neither_changes_the_file_nor_holds_the_whole_tensor(single):
    source = HuggingFaceSource(single)
    part = source.read(UP, (2, 0), (3, 36))
    assert part.untyped_storage().nbytes() == part.nbytes
    part.zero_()
    assert source.read(UP, (2, 0), (3, 36)).count_nonzero() > 0


def test_any_layout_loads_its_shards_directly(sharded):
    source, stored = HuggingFaceSource(sharded), stored_tensors(sharded)
    blocks = tuple(Block(f"layers.1.mlp.{part}.weight", (44, 36), units=44) for part in ("gate", "up"))
    spec = ShardSpec(blocks, dim=0)
    full = {b.name: stored[llama_name(b.name)] for b in blocks}
    for rank in range(4):
        local = torch.empty(spec.local_shape(4))
        load_tensors(source, [LocalTensor("model", spec.regions(rank, 4), local)])
        assert torch.equal(local, spec.take(full, rank, 4))


def test_open_source_takes_a_folder_for_what_it_is(single):
    assert isinstance(open_source(single), HuggingFaceSource)


def test_only_headers_are_read_when_a_folder_is_opened(sharded, monkeypatch):
    read = []
    monkeypatch.setattr(WeightFiles, "read", lambda *args: read.append(args))
    HuggingFaceSource(sharded)
    assert read == []


def test_buffers_of_old_files_are_passed_over(single):
    file = single / "model.safetensors"
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in range(3)}
    save_file({**load_file(file), **buffers}, file, {"format": "pt"})
    assert UP in HuggingFaceSource(single).names()


def test_a_tied_head_may_be_stored_twice_if_it_is_the_embedding(tmp_path):
    folder = save_llama(tmp_path / "m", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, file, {"format": "pt"})
    assert "model.head.weight" not in HuggingFaceSource(folder).names()

    head = embedding.clone()
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, file, {"format": "pt"})
    assert message_of(folder) == (
        f"{file} holds lm_head.weight, which differs from model.embed_tokens.weight, but {folder / 'config.json'} says "
        'that they are tied; set "tie_word_embeddings": false there, or remove the tensor.'
    )


def test_the_tokenizer_in_the_folder_is_named(single):
    assert HuggingFaceSource(single).tokenizer() is None
    (single / "tokenizer.model").write_bytes(b"")
    sentencepiece = HuggingFaceSource(single).tokenizer()
    assert (sentencepiece.tokenizer_type, sentencepiece.tokenizer_model) == (
        "SentencePieceTokenizer",
        str(single / "tokenizer.model"),
    )
    (single / "tokenizer.json").write_text("{}")
    assert HuggingFaceSource(single).tokenizer().tokenizer_type == "HuggingFaceTokenizer"


def test_a_missing_file_of_the_index_is_named(sharded):
    absent = middle_file(sharded)
    absent.unlink()
    assert message_of(sharded) == (
        f"{sharded / INDEX_FILE} names {absent.name}, which is missing in {sharded}; download the missing files."
    )


def test_a_missing_tensor_is_named(single):
    file = single / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != HF_UP}, file, {"format": "pt"})
    assert message_of(single) == (
        f"{single} does not hold the model that its config.json describes: {HF_UP} is missing. "
        "Download or save the folder again."
    )


def test_a_tensor_that_has_no_place_is_named_with_its_file(single):
    file = single / "model.safetensors"
    save_file({**load_file(file), "model.layers.1.self_attn.q_proj.bias": torch.ones(60)}, file, {"format": "pt"})
    assert "model.layers.1.self_attn.q_proj.bias in model.safetensors has no place in the model" in message_of(single)


def test_all_disagreements_with_the_config_are_listed_at_once(sharded):
    edit_json(sharded / "config.json", intermediate_size=48, num_hidden_layers=2)
    message = message_of(sharded)
    file = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]["model.layers.0.mlp.down_proj.weight"]
    assert f"model.layers.0.mlp.down_proj.weight has shape [36, 44] in {file}, not [36, 48]" in message
    assert "and 7 more" in message  # 3 shapes in each of 2 layers, and 9 tensors of the third layer; 8 are listed


def test_an_index_that_disagrees_with_the_files_is_an_error_that_names_both(sharded):
    index = sharded / INDEX_FILE
    file_of = json.loads(index.read_text())["weight_map"]
    here = file_of[HF_UP]
    there = next(file for file in file_of.values() if file != here)
    edit_json(index, weight_map={**file_of, HF_UP: there})
    message = message_of(sharded)
    assert f"{HF_UP} is not in {there}" in message
    assert f"{here} holds {HF_UP}, which the index does not say" in message

    edit_json(index, weight_map=...)
    assert message_of(sharded) == f"{index} has no weight_map from tensors to files; download it again."


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_file_that_was_cut_off_is_named_when_the_folder_is_opened(sharded, kept):
    file = middle_file(sharded)
    file.write_bytes(file.read_bytes()[:kept])
    message = message_of(sharded)
    assert message.startswith(f"{file} is no complete safetensors file (")
    assert message.endswith("it was cut off or damaged: download it again.")


def test_a_file_that_vanishes_later_is_named_with_the_tensor(single):
    source = HuggingFaceSource(single)
    (single / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {HF_UP} cannot be read .*download the file again"):
        source.read(UP, (0, 0), (1, 1))


def test_integer_weights_are_refused(single):
    file = single / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HF_UP: tensors[HF_UP].to(torch.int8)}, file, {"format": "pt"})
    assert message_of(single) == f"{file}: {HF_UP} has dtype I8; use the model in bf16, fp16 or fp32."


def test_folders_that_hold_no_weights_say_what_is_expected(single):
    (single / "model.safetensors").rename(single / "weights.safetensors")
    assert message_of(single) == (
        f"{single} has none of model.safetensors, {INDEX_FILE}, pytorch_model.bin and pytorch_model.bin.index.json; "
        "give a folder with a model's weights."
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON ("),
        ("[]", "holds no JSON object; download it again."),
        (None, "cannot be read (No such file or directory); give a Hugging Face model folder."),
    ],
)
def test_a_config_that_cannot_be_read_is_named(single, content, reason):
    config = single / "config.json"
    config.unlink()
    if content is not None:
        config.write_text(content)
    assert message_of(single).startswith(f"{config} {reason}")


def test_an_unsupported_config_is_named_with_its_path(single):
    edit_json(single / "config.json", hidden_act="relu")
    assert message_of(single).startswith(f"{single / 'config.json'}: hidden_act 'relu' is not supported")


def test_sizes_of_the_config_are_those_of_the_model(single):
    model = HuggingFaceSource(single).model_config()
    assert (model.hidden_size, model.kv_channels) == (SIZES["hidden_size"], SIZES["head_dim"])


def llama_name(native: str) -> str:
    """Every tensor of a Llama is one of ours under another name."""
    module, kind, layer = module_and_layer(native)
    (there,) = (m.name for m in LLAMA.modules if m.parts == (module,))
    return f"{there}.{kind}".format(i=layer)


def middle_file(folder):
    return sorted(folder.glob("*.safetensors"))[1]


def message_of(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        HuggingFaceSource(folder)
    return str(error.value)
