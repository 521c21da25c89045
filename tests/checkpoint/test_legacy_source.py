"""Trees of Megatron-LM and Megatron-LLM are read bit by bit, whatever ranks, spelling and version wrote them."""

from __future__ import annotations

import dataclasses
import enum
import errno
import os
import random
import re
import shutil
import sys
import types
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from legacy_trees import (
    BERT,
    FALCON_7B,
    FALCON_40B,
    GPT,
    GPT_ROTARY,
    LLAMA,
    MISTRAL,
    MULTI_HEAD,
    Spelling,
    Weights,
    random_weights,
    recorded_args,
    write_tree,
)
from megatron.checkpoint import open_source
from megatron.checkpoint.legacy import LegacySource, mapped
from megatron.checkpoint.legacy.arguments import Recorded
from megatron.checkpoint.legacy.tree import is_legacy_tree
from megatron.checkpoint.source import Source
from megatron.checkpoint.verify import verify_source
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig, RopeScaling
from megatron.tokenizer.config import TokenizerConfig

MODELS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "multi-head": MULTI_HEAD,
    "falcon 40b": FALCON_40B,
    "gpt": GPT,
    "gpt, rotary and gated": GPT_ROTARY,
    "bert": BERT,
}
SPELLINGS = {
    "TP1": Spelling(),
    "TP2": Spelling(tp=2),
    "TP2 PP2": Spelling(tp=2, pp=2),
    "PP4": Spelling(pp=4),
    "interleaved": Spelling(pp=2, virtual=2, tp=2),
    "converter": Spelling(names="converter"),
}


def assert_holds(source: Source, weights: Weights) -> None:
    assert set(source.names()) == {f"model.{name}" for name in weights}
    for name, tensor in weights.items():
        entry = f"model.{name}"
        assert (source.shape(entry), source.dtype(entry)) == (tuple(tensor.shape), tensor.dtype), name
        assert torch.equal(source.read(entry, (0,) * tensor.ndim, tensor.shape), tensor), name


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_model_is_read_from_every_layout(tmp_path, model, spelling):
    weights = random_weights(model)
    write_tree(tmp_path, model, weights, spelling)
    source = open_source(tmp_path)
    assert isinstance(source, LegacySource)
    assert source.model_config() == model
    assert_holds(source, weights)


@pytest.mark.parametrize("pp", [1, 2])
def test_one_key_head_for_all_queries_is_read_from_one_tensor_rank(tmp_path, pp):
    weights = random_weights(FALCON_7B, torch.bfloat16)
    write_tree(tmp_path, FALCON_7B, weights, Spelling(pp=pp))
    source = LegacySource(tmp_path)
    assert source.model_config() == FALCON_7B
    assert_holds(source, weights)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("model", [MULTI_HEAD, LLAMA, GPT, BERT], ids=["multi-head", "grouped", "biases", "bert"])
def test_each_version_has_its_order_of_queries_keys_and_values(tmp_path, model, version, tp):
    weights = random_weights(model)
    write_tree(tmp_path, model, weights, Spelling(tp=tp, version=version))
    assert_holds(LegacySource(tmp_path), weights)


@pytest.mark.parametrize("start, size", [((0, 0), (99, 99)), ((5, 3), (11, 9)), ((11, 0), (1, 99)), ((9, 19), (2, 1))])
@pytest.mark.parametrize("name", ["attention.q", "attention.k", "mlp.gate", "mlp.up", "attention.output", "mlp.down"])
def test_any_rectangle_is_what_the_whole_tensor_has_there(tmp_path, name, start, size):
    weights = random_weights(LLAMA)
    write_tree(tmp_path, LLAMA, weights, Spelling(tp=2, pp=2))
    whole = weights[f"layers.2.{name}.weight"]
    wanted = whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
    read = LegacySource(tmp_path).read(f"model.layers.2.{name}.weight", start, wanted.shape)
    assert read.is_contiguous()
    assert torch.equal(read, wanted)


@pytest.mark.parametrize("spelling", [Spelling(tp=2), Spelling(pp=2, virtual=2)], ids=["TP2", "interleaved"])
def test_files_of_the_old_format_and_compressed_ones_are_read_as_well(tmp_path, spelling):
    weights = random_weights(LLAMA)
    for number, file in enumerate(write_tree(tmp_path, LLAMA, weights, spelling).rglob("*.pt")):
        state = torch.load(file, weights_only=False)
        torch.save(state, file, _use_new_zipfile_serialization=bool(number))
        if number:
            with zipfile.ZipFile(file) as stored:
                records = {record.filename: stored.read(record) for record in stored.infolist()}
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
                for name, content in records.items():
                    packed.writestr(name, content)
    assert_holds(LegacySource(tmp_path), weights)


def test_each_file_is_parsed_once_for_all_that_is_read_from_it(tmp_path, monkeypatch):
    weights = random_weights(LLAMA)
    write_tree(tmp_path, LLAMA, weights, Spelling(tp=2))
    source, opened = LegacySource(tmp_path), []
    placed = mapped.PlacedTensors
    monkeypatch.setattr(mapped, "PlacedTensors", lambda path: opened.append(path) or placed(path))
    assert_holds(source, weights)
    assert len(opened) == 2


def lm_arguments(model: ModelConfig, **others: Any) -> dict[str, Any]:
    """The arguments of NVIDIA's program that differ from Megatron-LLM's; `...` stands for an absent one."""
    absent = ("glu_activation", "num_attention_heads_kv", "rope_theta", "rope_scaling_factor", "tie_embed_logits")
    return {
        **dict.fromkeys(absent),
        "swiglu": model.glu_activation == "swiglu",
        "normalization": "RMSNorm" if model.use_rms_norm else "LayerNorm",
        "untie_embeddings_and_output_weights": not model.tie_embed_logits,
        "group_query_attention": model.num_attention_heads != model.num_attention_heads_kv,
        "num_query_groups": model.num_attention_heads_kv,
        "position_embedding_type": "rope" if model.position_embedding_type == "rotary" else "learned_absolute",
        "rotary_base": int(model.rope_theta),
        "rotary_percent": 1.0,
        **others,
    }


def model_of(args: dict[str, Any]) -> ModelConfig:
    """What a tree of LLAMA with these arguments besides is taken for."""
    recorded = Namespace(**{**recorded_args(LLAMA, Spelling()), **args})
    return Recorded(recorded, 3.0, Path("tree")).model_config({"lm_head"}, LLAMA.vocab_size)


@pytest.mark.parametrize("names", ["trainer", "megatron_core"])
@pytest.mark.parametrize("model", [LLAMA, GPT], ids=["llama", "gpt"])
def test_megatron_lm_stores_the_gate_first_and_rotates_halves(tmp_path, model, names):
    weights = random_weights(model)
    spelling = Spelling(tp=2, pp=2, names=names, gate_first=True, rotary_pairs=False, args=lm_arguments(model))
    write_tree(tmp_path, model, weights, spelling)
    source = LegacySource(tmp_path)
    assert source.model_config() == model
    assert_holds(source, weights)


def test_megatron_lm_may_rotate_pairs(tmp_path):
    weights = random_weights(LLAMA)
    args = lm_arguments(LLAMA, rotary_interleaved=True, window_size=(15, 0), rotary_seq_len_interpolation_factor=4)
    write_tree(tmp_path, LLAMA, weights, Spelling(gate_first=True, args=args))
    source = LegacySource(tmp_path)
    model = source.model_config()
    assert model.sliding_window_size == 16  # fifteen to the left, and the token itself
    assert model.rope_scaling is not None
    assert (model.rope_scaling.type, model.rope_scaling.factor) == ("linear", 4.0)
    assert_holds(source, weights)


LM_SCALINGS: dict[str, tuple[dict[str, Any], RopeScaling | None]] = {
    "the default factor without the flag": ({"rope_scaling_factor": 8.0}, None),
    "the flag is off": ({"use_rope_scaling": False, "rope_scaling_factor": 8.0}, None),
    "off, and linear": (
        {"use_rope_scaling": False, "rope_scaling_factor": 8.0, "rotary_seq_len_interpolation_factor": 2},
        RopeScaling("linear", 2.0),
    ),
    "the flag is on": (
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
        RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
    ),
    "on, before the factor was an argument": ({"use_rope_scaling": True}, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
}


@pytest.mark.parametrize("args, expected", LM_SCALINGS.values(), ids=LM_SCALINGS)
def test_megatron_lm_scales_as_llama_3_does_where_its_flag_says_so(args, expected):
    model = model_of(lm_arguments(LLAMA, **args))
    assert model.rope_scaling == expected


def test_megatron_llm_scales_linearly_by_its_factor():
    assert model_of({"rope_scaling_factor": 4.0}).rope_scaling == RopeScaling("linear", 4.0)
    assert model_of({"rope_scaling_factor": 1.0}).rope_scaling is None


def test_a_window_without_an_end_is_none():
    assert model_of(lm_arguments(LLAMA, window_size=(-1, 0))).sliding_window_size is None


def test_norms_around_one_have_two_names():
    assert model_of(lm_arguments(LLAMA, layernorm_zero_centered_gamma=True)).apply_layernorm_1p


def test_two_scalings_at_once_are_refused():
    with pytest.raises(CheckpointError, match="interpolation_factor 2.0 and use_rope_scaling, which together are not"):
        model_of(lm_arguments(LLAMA, use_rope_scaling=True, rotary_seq_len_interpolation_factor=2))


@pytest.mark.parametrize(
    "name, value",
    [
        ("no_rope_freq", 4),
        ("no_rope_freq", [0, 0, 0, 1]),
        ("rope_type", "yarn"),
        ("mrope_section", [1, 1, 1]),
        ("window_attn_skip_freq", 2),
        ("softmax_type", "off-by-one"),
        ("softmax_scale", 0.5),
        ("qk_l2_norm", True),
        ("attention_output_gate", True),
        ("quick_geglu", True),
        ("activation_func_clamp_value", 7.0),
        ("glu_linear_offset", 1.0),
        ("use_mup", True),
        ("heterogeneous_layers_config_path", "layers.json"),
        ("heterogeneous_layers_config_encoded_json", "{}"),
    ],
)
def test_an_argument_that_changes_the_function_is_refused(name, value):
    with pytest.raises(
        CheckpointError, match=re.escape(f"the model was trained with {name} {value!r}, which is not supported")
    ):
        model_of(lm_arguments(LLAMA, **{name: value}))


def test_the_defaults_of_arguments_that_change_the_function_are_read():
    defaults = {"no_rope_freq": None, "softmax_type": "vanilla", "glu_linear_offset": 0.0, "quick_geglu": False}
    assert model_of(lm_arguments(LLAMA, qk_l2_norm=False, rope_type="rope", **defaults)) == LLAMA


def test_the_first_trees_of_megatron_llm_are_read_when_their_order_is_given(tmp_path):
    weights = random_weights(LLAMA)
    write_tree(tmp_path, LLAMA, weights, Spelling(rotary_pairs=False))
    assert_holds(LegacySource(tmp_path, rotary_pairs=False), weights)


def test_enums_of_the_program_are_understood(tmp_path, monkeypatch):
    module = types.ModuleType("megatron.model.enums")
    kinds = enum.Enum("PositionEmbeddingType", {"rotary": 1, "absolute": 2}, module="megatron.model.enums")
    monkeypatch.setattr(module, "PositionEmbeddingType", kinds, raising=False)
    monkeypatch.setitem(sys.modules, "megatron.model.enums", module)
    for model, kind in ((LLAMA, kinds.rotary), (GPT, kinds.absolute)):
        root = tmp_path / kind.name
        write_tree(root, model, random_weights(model), Spelling(args={"position_embedding_type": kind}))
        assert LegacySource(root).model_config() == model


def test_what_converters_leave_out_has_the_default_of_the_flag(tmp_path):
    """And a published model is one without dropout."""
    model = dataclasses.replace(FALCON_7B, hidden_size=24, ffn_hidden_size=96)
    absent = ("use_rms_norm", "layernorm_epsilon", "glu_activation", "bias_gelu_fusion", "rope_theta", "kv_channels")
    absent += ("ffn_hidden_size", "tie_embed_logits", "attention_dropout", "init_method_std", "sliding_window_size")
    write_tree(tmp_path, model, random_weights(model), Spelling(names="converter", args=dict.fromkeys(absent)))
    assert LegacySource(tmp_path).model_config() == model


def test_padding_is_dropped_where_the_number_of_tokens_is_known_and_spoken_of_where_not(tmp_path):
    weights = random_weights(LLAMA)
    write_tree(tmp_path, LLAMA, weights, Spelling(args={"vocab_size": None}))
    source = LegacySource(tmp_path)
    assert source.shape("model.embedding.word.weight") == (256, 20)
    assert source.model_config().vocab_size == 256
    assert "how many of its 256 vocabulary rows are padding: all are kept; --true_vocab_size" in source.notes[0]
    assert_holds(LegacySource(tmp_path, true_vocab_size=131), weights)
    with pytest.raises(CheckpointError, match="has 256 vocabulary rows, not 300; give the number of tokens"):
        LegacySource(tmp_path, true_vocab_size=300)


def test_what_a_run_recorded_besides_weights_is_kept(tmp_path):
    write_tree(tmp_path, LLAMA, random_weights(LLAMA), Spelling(args={"model_name": "llama2"}))
    source = LegacySource(tmp_path)
    state = source.state()
    assert state is not None
    assert (state.iteration, state.consumed_samples, state.optimizer) == (100, 6400, {})
    assert source.model_name() == "llama2"
    assert source.tokenizer() is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    identity = source.tokenizer()
    assert identity is not None
    assert (identity.tokenizer_type, identity.tokenizer_model) == (
        "SentencePieceTokenizer",
        str(tmp_path / "tokenizer.model"),
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"tokenizer_type": "SentencePieceTokenizer", "vocab_file": None}, None),
        (
            {
                "tokenizer_type": "SentencePieceTokenizer",
                "vocab_file": "/gone/sp.model",
                "vocab_extra_ids": 2,
                "vocab_extra_ids_list": "[a],[b]",
                "new_tokens": True,
            },
            TokenizerConfig(
                tokenizer_type="SentencePieceTokenizer",
                tokenizer_model="/gone/sp.model",
                vocab_extra_ids=2,
                vocab_extra_ids_list=("[a]", "[b]"),
            ),
        ),
        (
            {"tokenizer_type": "SentencePieceTokenizer", "vocab_file": "/gone/sp.model", "new_tokens": False},
            TokenizerConfig(
                tokenizer_type="SentencePieceTokenizer", tokenizer_model="/gone/sp.model", no_new_tokens=True
            ),
        ),
        (
            {"tokenizer_type": "Llama2Tokenizer", "tokenizer_model": "/gone/sp.model"},
            TokenizerConfig(
                tokenizer_type="SentencePieceTokenizer", tokenizer_model="/gone/sp.model", no_new_tokens=True
            ),
        ),
        (
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": "/gone/v.json", "merge_file": "/gone/m.txt"},
            TokenizerConfig(
                tokenizer_type="GPT2BPETokenizer", tokenizer_model="/gone/v.json", merge_file="/gone/m.txt"
            ),
        ),
        (
            {"tokenizer_type": "BertWordPieceCase", "vocab_file": "/gone/vocab.txt"},
            TokenizerConfig(tokenizer_type="BertWordPieceCase", tokenizer_model="/gone/vocab.txt"),
        ),
        ({"tokenizer_type": "MultimodalTokenizer", "tokenizer_model": "name"}, None),
        ({"tokenizer_type": ["odd"], "vocab_file": 3}, None),
    ],
)
def test_the_tokenizer_that_a_run_recorded_is_known(tmp_path, args, expected):
    write_tree(tmp_path, LLAMA, random_weights(LLAMA), Spelling(args=args))
    source = LegacySource(tmp_path)
    section = source.state().config.get("tokenizer")
    assert (None if section is None else TokenizerConfig(**section)) == expected
    assert source.tokenizer() is None


def test_an_iteration_or_the_release_is_chosen_by_tracker_number_or_folder(tmp_path):
    weights = random_weights(LLAMA)
    for name in ("iter_0000100", "iter_0000200", "release"):
        write_tree(tmp_path, LLAMA, weights, Spelling(), name=name)
    assert LegacySource(tmp_path).path.name == "release"
    assert LegacySource(tmp_path).state() is None
    assert LegacySource(tmp_path, 100).path.name == "iter_0000100"
    assert LegacySource(tmp_path, 0).path.name == "release"
    assert open_source(tmp_path / "iter_0000200").path.name == "iter_0000200"
    with pytest.raises(
        CheckpointError, match="iter_0000300 holds no mp_rank_XX.*--load_iters 300 asks for it;.*found "
    ):
        LegacySource(tmp_path, 300)
    with pytest.raises(CheckpointError, match="--load_iters 100: .*iter_0000200; give its parent folder"):
        LegacySource(tmp_path / "iter_0000200", 100)


def rank_file(root: Path, rank: str = "mp_rank_00_000") -> Path:
    return root / "iter_0000100" / rank / "model_optim_rng.pt"


def edit(file: Path, change: Any) -> None:
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)


def encoder(state: dict[str, Any]) -> dict[str, Any]:
    return state["model"]["language_model"]["encoder"]


KEY = "layers.0.mlp.dense_4h_to_h.weight"
DAMAGES: dict[str, tuple[Any, str]] = {
    "a rank's folder is missing": (
        lambda root: shutil.rmtree(rank_file(root, "mp_rank_01_001").parent),
        "was saved by 2 tensor and 2 pipeline ranks, and mp_rank_01_001 is missing; copy the whole folder again",
    ),
    "a rank too many": (
        lambda root: shutil.copytree(rank_file(root).parent, root / "iter_0000100/mp_rank_02_000"),
        "2 pipeline ranks, and holds mp_rank_02_000 besides; remove what is left of another checkpoint",
    ),
    "another shape on one rank": (
        lambda root: edit(rank_file(root), lambda s: encoder(s).update({KEY: torch.zeros(20, 13)})),
        f"encoder.{KEY} has shape [20, 13] in mp_rank_00_000, not [20, 14]",
    ),
    "another dtype on one rank": (
        lambda root: edit(
            rank_file(root, "mp_rank_01_000"), lambda s: encoder(s).update({KEY: torch.zeros(20, 14).half()})
        ),
        f"encoder.{KEY} is torch.float16 in mp_rank_01_000, not torch.float32",
    ),
    "a missing tensor": (
        lambda root: edit(rank_file(root), lambda s: encoder(s).pop(KEY)),
        f"encoder.{KEY} is missing in mp_rank_00_000",
    ),
    "an unknown tensor": (
        lambda root: edit(rank_file(root), lambda s: encoder(s).update({"layers.0.mlp.router": torch.zeros(1)})),
        "encoder.layers.0.mlp.router in mp_rank_00_000 has no place in the model",
    ),
    "a missing layer": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.update(num_layers=5)),
        "there are 4 layers, not 5",
    ),
    "no embedding": (
        lambda root: edit(rank_file(root), lambda s: s["model"]["language_model"].pop("embedding")),
        "holds no embedding.word_embeddings.weight, which the first stage of a language model has",
    ),
    "another padding": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.update(padded_vocab_size=384)),
        "padded_vocab_size 384, and embedding.word_embeddings.weight has 256 rows on 2 tensor ranks",
    ),
    "another number of chunks": (
        lambda root: edit(
            rank_file(root, "mp_rank_01_001"), lambda s: s.update(model0=s["model"], model1=s.pop("model"))
        ),
        "holds 2 model chunks, and",
    ),
    "key heads that cannot be cut": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.update(num_attention_heads_kv=1)),
        "num_attention_heads_kv 1, which cannot have been cut over 2 tensor ranks",
    ),
    "no arguments": (
        lambda root: edit(rank_file(root), lambda s: s.pop("args")),
        "records no args, so that its model is unknown",
    ),
    "a missing argument": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.pop("hidden_size")),
        "its args lack hidden_size",
    ),
    "an impossible argument": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.update(hidden_size="wide")),
        "hidden_size 'wide', which is not a positive integer",
    ),
    "heads that do not divide": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.update(num_attention_heads=3)),
        "--num_attention_heads 3 is not a multiple of --num_attention_heads_kv 2",
    ),
    "heads that cannot rotate": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.update(kv_channels=5)),
        "its heads are 5 wide, and rotation pairs dimensions",
    ),
    "an unsupported model": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.update(use_post_ln=True)),
        "the model was trained with use_post_ln True, which is not supported",
    ),
    "unsupported positions": (
        lambda root: edit(rank_file(root), lambda s: s["args"].__dict__.update(position_embedding_type="alibi")),
        "position_embedding_type 'alibi' is not supported; rotary and absolute are",
    ),
    "an unknown version": (
        lambda root: edit(rank_file(root), lambda s: s.update(checkpoint_version=4.0)),
        "checkpoint_version 4.0 is unknown; the versions are 0, 1.0, 2.0, 3.0",
    ),
    "a version that is no number": (
        lambda root: edit(rank_file(root), lambda s: s.update(checkpoint_version="new")),
        "checkpoint_version 'new', which is no number",
    ),
    "no model": (
        lambda root: edit(rank_file(root), lambda s: s.pop("model")),
        "holds no model; it is no checkpoint of Megatron-LM or Megatron-LLM",
    ),
    "a truncated file": (
        lambda root: rank_file(root, "mp_rank_01_000").write_bytes(
            rank_file(root, "mp_rank_01_000").read_bytes()[:-900]
        ),
        "mp_rank_01_000/model_optim_rng.pt is damaged or no file of torch.save",
    ),
    "a garbage tracker": (
        lambda root: (root / "latest_checkpointed_iteration.txt").write_bytes(b"\xff 100 or so"),
        "latest_checkpointed_iteration.txt holds b'\\xff 100 or so', which is neither an iteration nor release",
    ),
    "no tracker": (
        lambda root: (root / "latest_checkpointed_iteration.txt").unlink(),
        "latest_checkpointed_iteration.txt cannot be read (No such file or directory); name an iteration",
    ),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_tree_that_is_not_whole_is_named_with_what_is_wrong(tmp_path, damage, message):
    write_tree(tmp_path, LLAMA, random_weights(LLAMA), Spelling(tp=2, pp=2))
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        open_source(tmp_path)
    assert str(tmp_path) in str(raised.value)


ANOTHER_CHECKPOINT: dict[str, tuple[Any, str]] = {
    "another iteration": (lambda s: s.update(iteration=200), "iteration 200, not 100"),
    "another version": (lambda s: s.update(checkpoint_version=2.0), "checkpoint_version 2.0, not 3.0"),
    "another model": (
        lambda s: s["args"].__dict__.update(rope_theta=1.0, layernorm_epsilon=0.5),
        "layernorm_epsilon 0.5, not 1e-05; rope_theta 1.0, not 70000.0",
    ),
    "another moment": (
        lambda s: s["args"].__dict__.update(consumed_train_samples=12800),
        "consumed_train_samples 12800, not 6400",
    ),
    "other ranks": (
        lambda s: s["args"].__dict__.update(tensor_model_parallel_size=4),
        "tensor_model_parallel_size 4, not 2",
    ),
}


@pytest.mark.parametrize("change, difference", ANOTHER_CHECKPOINT.values(), ids=ANOTHER_CHECKPOINT)
def test_files_of_two_checkpoints_are_no_tree(tmp_path, change, difference):
    write_tree(tmp_path, LLAMA, random_weights(LLAMA), Spelling(tp=2, pp=2))
    edit(rank_file(tmp_path, "mp_rank_01_001"), change)
    with pytest.raises(CheckpointError, match=re.escape(f"it has {difference}. Copy the whole")) as raised:
        open_source(tmp_path)
    first, other = rank_file(tmp_path), rank_file(tmp_path, "mp_rank_01_001")
    assert str(raised.value).startswith(f"{other} is not of the same checkpoint as {first}")


def test_the_rank_that_is_missing_may_be_the_first(tmp_path):
    write_tree(tmp_path, LLAMA, random_weights(LLAMA), Spelling(tp=2))
    shutil.rmtree(tmp_path / "iter_0000100" / "mp_rank_00")
    with pytest.raises(CheckpointError, match="and mp_rank_00 is missing"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "key, name",
    [
        ("final_layernorm.weight", "final_norm.weight"),
        ("layers.1.self_attention.dense.bias", "layers.3.attention.output.bias"),
    ],
)
def test_copies_on_tensor_ranks_that_differ_are_found_when_they_are_read(tmp_path, key, name):
    weights = random_weights(GPT)
    write_tree(tmp_path, GPT, weights, Spelling(tp=2, pp=2))
    edit(rank_file(tmp_path, "mp_rank_01_001"), lambda s: encoder(s)[key][7:8].add_(1))
    source = LegacySource(tmp_path)
    assert torch.equal(source.read(f"model.{name}", (0,), (7,)), weights[name][:7])
    with pytest.raises(CheckpointError, match=f"{key} in mp_rank_01_001 differs from encoder.{key} in mp_rank_00_001"):
        source.read(f"model.{name}", (5,), (6,))
    damage = verify_source(source, on_bytes=lambda _: None).damage
    assert [key in line for line in damage] == [True]


def test_copies_may_hold_what_is_no_number(tmp_path):
    weights = random_weights(LLAMA)
    weights["final_norm.weight"][3] = float("nan")
    write_tree(tmp_path, LLAMA, weights, Spelling(tp=2))
    assert LegacySource(tmp_path).read("model.final_norm.weight", (0,), (20,)).isnan().sum() == 1


def test_a_copy_of_another_dtype_is_none(tmp_path):
    write_tree(tmp_path, GPT, random_weights(GPT), Spelling(pp=2))

    def change(state: dict[str, Any]) -> None:
        copy = state["model"]["word_embeddings_for_head"]
        copy["weight"] = copy["weight"].double()

    edit(rank_file(tmp_path, "mp_rank_00_001"), change)
    with pytest.raises(CheckpointError, match="word_embeddings_for_head.weight in mp_rank_00_001 differs from"):
        LegacySource(tmp_path).read("model.embedding.word.weight", (0, 0), (1, 20))


@pytest.mark.parametrize("names", ["trainer", "megatron_core"])
def test_a_head_that_is_no_copy_of_its_embedding_is_found(tmp_path, names):
    args = {} if names == "trainer" else lm_arguments(GPT)
    weights = random_weights(GPT)
    write_tree(tmp_path, GPT, weights, Spelling(tp=2, pp=2, names=names, gate_first=True, args=args))
    copied = "word_embeddings_for_head" if names == "trainer" else "output_layer.weight"

    def change(state: dict[str, Any]) -> None:
        copy = state["model"][copied]
        (copy if names == "megatron_core" else copy["weight"])[0].add_(1)

    edit(rank_file(tmp_path, "mp_rank_01_001"), change)
    source = LegacySource(tmp_path)
    name = "model.embedding.word.weight"
    assert torch.equal(source.read(name, (0, 0), (128, 20)), weights["embedding.word.weight"][:128])
    with pytest.raises(
        CheckpointError, match="mp_rank_01_001 differs from embedding.word_embeddings.weight in mp_rank_01_000"
    ):
        source.read(name, (120, 0), (11, 20))


class RunsAProgram:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_001"])
def test_a_tree_that_runs_a_program_is_refused_and_nothing_is_executed(tmp_path, rank):
    write_tree(tmp_path, LLAMA, random_weights(LLAMA), Spelling(tp=2, pp=2))
    edit(rank_file(tmp_path, rank), lambda s: s.update(rng_state=RunsAProgram(tmp_path / "canary")))
    with pytest.raises(CheckpointError, match=rf"{rank}/model_optim_rng.pt names posix.system, .*Nothing was executed"):
        open_source(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_no_flipped_bit_goes_unnoticed_or_breaks_anything(tmp_path):
    """Wherever it is, the file is named, or every tensor is what it was: names and tensors have checksums."""
    weights = random_weights(LLAMA)
    file = write_tree(tmp_path, LLAMA, weights, Spelling()) / "mp_rank_00" / "model_optim_rng.pt"
    whole, generator = file.read_bytes(), random.Random(5)
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            assert_holds(LegacySource(tmp_path), weights)
        except CheckpointError as error:
            assert str(file) in str(error) or str(file.parent.parent) in str(error)


def test_folders_that_other_ranks_make_and_remove_are_not_looked_into(tmp_path: Path, monkeypatch) -> None:
    """A rank that begins to save tries the folder, while another still asks what kind of checkpoint it holds."""
    (tmp_path / ".tmp-probe-5a").mkdir()
    scandir = os.scandir

    def removed_meanwhile(path: object = ".") -> object:
        if ".tmp-probe" in str(path):
            raise FileNotFoundError(errno.ENOENT, "removed meanwhile", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removed_meanwhile)
    assert not is_legacy_tree(tmp_path)
    write_tree(tmp_path, LLAMA, random_weights(LLAMA), Spelling())
    assert is_legacy_tree(tmp_path)
