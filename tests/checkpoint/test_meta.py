"""Meta's folders as a source: merged over shards, rotary order turned, every defect named."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch

from hf_folders import edit_json
from megatron.checkpoint.meta import MetaSource
from megatron.checkpoint.meta_params import model_config_from_params
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError, DamagedCheckpointError
from megatron.model.presets import preset
from meta_folders import DIM, FFN, HEAD_DIM, HEADS, HEADS_KV, LAYERS, VOCAB, interleaved, random_weights, save_meta

Q = "model.layers.1.attention.q.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_meta(tmp_path_factory.mktemp("meta") / "model", random_weights(), 4)


@pytest.fixture
def folder(pristine, tmp_path):
    """Four shards, to damage."""
    return shutil.copytree(pristine, tmp_path / "model")


def _whole(source, name):
    shape = source.shape(name)
    return source.read(name, (0,) * len(shape), shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_merged_shards_are_the_weights_bit_for_bit(num_shards, embedding_dim, tied, tmp_path):
    weights = random_weights(tied=tied)
    source = MetaSource(save_meta(tmp_path, weights, num_shards, embedding_dim=embedding_dim))
    assert {name.removeprefix("model.") for name in source.names()} == weights.keys()
    assert source.model_config().tie_embed_logits == tied
    for name, tensor in weights.items():
        assert source.dtype(f"model.{name}") == torch.bfloat16
        assert torch.equal(_whole(source, f"model.{name}"), tensor), name


def test_the_stored_order_turned_gives_the_attention_scores_of_metas_rotation():
    """Meta turns a head's pairs (2j, 2j + 1) as complex numbers; here halves are turned. Scores must not differ."""
    torch.manual_seed(0)
    q, k = torch.randn(2, HEAD_DIM, DIM, dtype=torch.float64)
    x = torch.randn(5, DIM, dtype=torch.float64)
    angles = torch.arange(5.0).outer(0.3 ** torch.arange(HEAD_DIM // 2)).double()

    def metas(weight):
        pairs = torch.view_as_complex((x @ interleaved(weight, HEAD_DIM).T).view(5, -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)

    def ours(weight):
        first, second = (x @ weight.T).chunk(2, dim=1)
        sin, cos = angles.sin(), angles.cos()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    torch.testing.assert_close(ours(q) @ ours(k).T, metas(q) @ metas(k).T)


def test_the_order_of_rows_is_the_one_that_transformers_converts_to():
    """Its conversion views a matrix as (heads, pairs, 2, columns) and exchanges the middle dimensions."""
    ours = random_weights()["layers.0.attention.k.weight"]
    stored = interleaved(ours)
    converted = stored.view(HEADS_KV, HEAD_DIM // 2, 2, DIM).transpose(1, 2).reshape(HEADS_KV * HEAD_DIM, DIM)
    assert torch.equal(converted, ours)


@pytest.mark.parametrize(
    ("start", "size"),
    [
        ((0, 0), (48, 48)),
        ((5, 0), (9, 48)),
        ((0, 7), (48, 30)),
        ((47, 47), (1, 1)),
        ((11, 11), (26, 2)),
        ((6, 0), (6, 3)),
    ],
)
@pytest.mark.parametrize("name", [Q, "model.layers.0.attention.output.weight", "model.embedding.word.weight"])
def test_a_slice_is_the_slice_of_the_whole_across_shards_and_heads(pristine, name, start, size):
    source = MetaSource(pristine)
    part = source.read(name, start, size)
    expected = random_weights()[name.removeprefix("model.")]
    assert torch.equal(part, expected[start[0] : start[0] + size[0], start[1] : start[1] + size[1]])
    assert part.is_contiguous() and part.untyped_storage().nbytes() <= 2 * 48 * 48


def test_bits_that_changed_are_found_when_a_tensor_is_read_as_a_whole(folder):
    """torch.save stores checksums, which torch.load does not look at."""
    source = MetaSource(folder)
    rows = source.read("model.layers.1.attention.v.weight", (6, 0), (6, 48))
    file = folder / "consolidated.01.pth"
    content = bytearray(file.read_bytes())
    content[content.index(rows.view(torch.uint8).numpy().tobytes()) + 100] ^= 4
    file.write_bytes(content)
    with pytest.raises(
        DamagedCheckpointError, match=r"consolidated.01.pth: what lies at byte \d+ does not have its checks"
    ):
        _whole(MetaSource(folder), "model.layers.1.attention.v.weight")


def test_any_layout_is_resharded_to_from_shards_without_a_detour(pristine, tmp_path):
    source = open_source(pristine)
    assert isinstance(source, MetaSource)
    written = NativeSource(reshard(plan_resharding(source, ParallelLayout(tp=2, pp=2)), tmp_path, on_bytes=int))
    assert written.model_config() == source.model_config()
    for name, tensor in random_weights().items():
        assert torch.equal(_whole(written, f"model.{name}"), tensor)


def test_a_head_that_repeats_the_embedding_is_a_tied_one(tmp_path):
    weights = random_weights()
    weights["head.weight"] = weights["embedding.word.weight"]
    source = MetaSource(save_meta(tmp_path, weights, 2, embedding_dim=0))
    assert source.model_config().tie_embed_logits
    assert "model.head.weight" not in source.names()


def test_the_architecture_is_that_of_params_json_and_the_shapes(pristine):
    model = MetaSource(pristine).model_config()
    sizes = (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_attention_heads_kv)
    assert sizes == (LAYERS, DIM, HEADS, HEADS_KV)
    assert (model.ffn_hidden_size, model.vocab_size, model.kv_channels) == (FFN, VOCAB, HEAD_DIM)
    # 1e-5 and a theta of 1e4 are Llama 2's, which read 4096 tokens.
    assert (model.layernorm_epsilon, model.rope_theta, model.max_position_embeddings) == (1e-5, 1e4, 4096)
    assert MetaSource(pristine).state() is None and MetaSource(pristine).model_name() is None


PUBLISHED = {
    ("llama", "7"): {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6},
    ("llama2", "7"): {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5},
    ("llama2", "70"): {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
        "norm_eps": 1e-5,
    },
    ("codellama", "34"): {
        "dim": 8192,
        "n_layers": 48,
        "n_heads": 64,
        "n_kv_heads": 8,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.0,
        "norm_eps": 1e-5,
        "rope_theta": 1000000,
    },
    ("llama3", "8"): {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    ("llama3", "3.1-405"): {
        "dim": 16384,
        "n_layers": 126,
        "n_heads": 128,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.2,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    ("llama3", "3.2-1"): {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "multiple_of": 256,
        "ffn_dim_multiplier": 1.5,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
}


@pytest.mark.parametrize("given_family", [False, True])
@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_the_published_parameters_are_the_preset(family, size, given_family, tmp_path):
    expected, params = preset(family, size), PUBLISHED[family, size]
    found = model_config_from_params(
        params,
        tmp_path / "params.json",
        vocab_size=expected.vocab_size,
        tied=expected.tie_embed_logits,
        family=family if given_family else None,
    )
    assert found == expected


def test_stretched_frequencies_of_another_size_take_the_factor_in_the_file_or_that_of_llama_3_1(tmp_path):
    params = {**PUBLISHED["llama3", "3.1-405"], "n_layers": 3}

    def factor(**more):
        file = tmp_path / "params.json"
        return model_config_from_params(params | more, file, vocab_size=128256, tied=False).rope_scaling.factor

    assert (factor(), factor(rope_scaling_factor=16)) == (8.0, 16.0)


def test_explicit_widths_and_a_window_are_taken_as_they_are(tmp_path):
    """Mistral's folders have the same files, with the widths spelled out."""
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 24, "hidden_dim": 96}
    model = model_config_from_params(
        params | {"sliding_window": 4096, "norm_eps": 1e-5}, tmp_path / "params.json", vocab_size=32000, tied=False
    )
    assert (model.kv_channels, model.ffn_hidden_size, model.sliding_window_size) == (24, 96, 4096)


def test_a_family_that_meta_has_not_published_is_named(pristine):
    assert MetaSource(pristine, family="llama").model_config().max_position_embeddings == 2048
    assert MetaSource(pristine, family="llama").model_name() == "llama"
    with pytest.raises(
        CheckpointError, match=r"params.json describes no falcon: Meta's format is that of llama, llama2"
    ):
        MetaSource(pristine, family="falcon")


def test_files_in_the_old_format_of_torch_save_are_read(tmp_path):
    weights = random_weights()
    save_meta(tmp_path, weights)
    file = tmp_path / "consolidated.00.pth"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    source = MetaSource(tmp_path)
    for name, tensor in weights.items():
        assert torch.equal(_whole(source, f"model.{name}"), tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": ...}, "dim is missing"),
        ({"n_heads": "8"}, "n_heads is '8', which is no positive integer"),
        ({"norm_eps": -1}, "norm_eps is -1, which is no positive number"),
        ({"vocab_size": 99}, "vocab_size is 99, but the embeddings have 140 rows"),
        ({"n_heads": 7}, "is not a multiple of"),
        ({"quantization_args": {"scheme": "int8"}}, "quantization_args is not supported"),
        ({"n_layers": 3}, "layers.2.attention_norm.weight is missing"),
        ({"n_layers": 1}, "layers.1.attention_norm.weight has no place in the model"),
        ({"multiple_of": 256}, r"feed_forward.w1.weight has shape \[132, 48\], not \[256, 48\]"),
        ({"dim": 24}, "cut neither by rows nor by columns from a matrix with 24 columns"),
    ],
)
def test_params_that_are_not_those_of_the_weights_are_named(folder, changes, message):
    edit_json(folder / "params.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        MetaSource(folder)


def test_absent_or_damaged_params_are_named(folder):
    (folder / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params.json is not JSON"):
        MetaSource(folder)
    (folder / "params.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        MetaSource(folder)
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match="it says the sizes of the model: put it beside the weights"):
        open_source(folder)


def test_a_shard_missing_in_the_middle_or_at_the_end_is_named(folder):
    (folder / "consolidated.03.pth").unlink()
    with pytest.raises(CheckpointError, match="tok_embeddings.weight has shape .* in each of 3 shards"):
        MetaSource(folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"lacks consolidated.01.pth; download"):
        MetaSource(folder)
    for file in folder.glob("*.pth"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"has no consolidated"):
        MetaSource(folder)


def _edit_shard(folder, number, edit):
    file = folder / f"consolidated.{number:02d}.pth"
    state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)


def test_shards_that_do_not_belong_together_are_named(folder):
    _edit_shard(folder, 2, lambda state: state["norm.weight"].add_(1))
    with pytest.raises(
        CheckpointError, match=r"consolidated.02.pth holds another norm.weight than consolidated.00.pth"
    ):
        MetaSource(folder)
    _edit_shard(folder, 2, lambda state: state.update({"norm.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"norm.weight differs between the shards \(shapes \[48\]"):
        MetaSource(folder)
    _edit_shard(folder, 2, lambda state: state.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"do not hold the same tensors: norm.weight is in one of them only"):
        MetaSource(folder)


def test_tensors_of_other_models_and_dtypes_are_named(folder, tmp_path):
    for number in range(4):
        _edit_shard(folder, number, lambda state: state.update({"layers.0.gate.weight": torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match=r"layers.0.gate.weight is no tensor of a Llama model"):
        MetaSource(folder)
    other = save_meta(tmp_path / "other", random_weights(dtype=torch.float64))
    with pytest.raises(CheckpointError, match=r"tok_embeddings.weight is torch.float64, not bf16, fp16 or fp32"):
        MetaSource(other)
    torch.save({"weight": torch.ones(2)}, other / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"has no matrix tok_embeddings.weight"):
        MetaSource(other)
    torch.save({"iteration": 3}, other / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        MetaSource(other)


def test_a_shard_cut_off_anywhere_is_named(folder):
    file = folder / "consolidated.01.pth"
    content = file.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"consolidated.01.pth"):
            MetaSource(folder)


def test_a_shard_that_would_run_a_program_is_refused_and_nothing_runs(folder, tmp_path):
    canary = tmp_path / "canary"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    torch.save({"tok_embeddings.weight": torch.ones(2, 2), "x": Malicious()}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="system"):
        open_source(folder)
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        open_source(folder)
    assert not canary.exists()


def test_the_tokenizer_beside_or_above_the_weights_is_that_of_its_kind(folder):
    assert MetaSource(folder).tokenizer() is None
    (folder.parent / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    identity = MetaSource(folder).tokenizer()
    assert identity.tokenizer_type == "SentencePieceTokenizer"
    assert identity.tokenizer_model == str(folder.parent / "tokenizer.model")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert MetaSource(folder).tokenizer().tokenizer_type == "TikTokenizer"


def test_an_iteration_of_metas_files_does_not_exist(folder):
    with pytest.raises(CheckpointError, match=r"--load_iters 3: .* are Meta's weights, which have none; drop it"):
        open_source(folder, 3)


def test_a_folder_with_hugging_faces_weights_too_is_read_as_theirs(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert isinstance(open_source(folder), MetaSource)
    (folder / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="model_type"):
        open_source(folder)
