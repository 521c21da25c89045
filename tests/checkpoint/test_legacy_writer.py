"""Trees are written as Megatron-LLM writes them, key by key and bit by bit, and appear whole or not at all."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_folders import FAMILIES, loaded_config, save_family, stored_tensors
from legacy_trees import (
    BERT,
    FALCON_7B,
    FALCON_40B,
    GPT,
    GPT_ROTARY,
    LLAMA,
    MISTRAL,
    Spelling,
    Weights,
    random_weights,
    write_tree,
)
from megatron.checkpoint import RunState, open_source
from megatron.checkpoint.hf_export import plan_export, split_by_size, write_hf_folder
from megatron.checkpoint.importing import import_weights
from megatron.checkpoint.legacy import LegacySource, LegacyTreePlan, plan_legacy_tree, write_legacy_tree, writer
from megatron.checkpoint.legacy.recording import beyond_megatron_llm
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.source import TokenizerIdentity
from megatron.checkpoint.unpickle import read_torch_file
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig, RopeScaling


class MemorySource:
    """A source of tensors in memory."""

    def __init__(self, model: ModelConfig, weights: Weights, *, iteration: int | None = 100, **others: Tensor):
        self.path = Path("memory")
        self._model, self._iteration = model, iteration
        self._entries = {f"model.{name}": tensor for name, tensor in weights.items()} | others

    def names(self) -> Sequence[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        slices = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        return self._entries[name][slices].clone()

    def model_config(self) -> ModelConfig:
        return self._model

    def model_name(self) -> str | None:
        return None

    def tokenizer(self) -> TokenizerIdentity | None:
        return None

    def state(self) -> RunState | None:
        return None if self._iteration is None else RunState(self._iteration, consumed_samples=6400, seed=1234)


LAYOUTS = {
    "TP1": Spelling(padded=256),
    "TP2 PP2": Spelling(tp=2, pp=2),
    "PP2 with two chunks": Spelling(tp=2, pp=2, virtual=2),
}
MODELS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "falcon 40b": FALCON_40B,
    "gpt": GPT,
    "gpt, rotary and gated": GPT_ROTARY,
    "bert": BERT,
}


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}/{name}")
    else:
        yield key, value


def assert_same_tree(written: Path, expected: Path) -> None:
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.pt"))
    assert sorted(path.relative_to(written) for path in written.rglob("*.pt")) == files
    for file in files:
        ours, theirs = (dict(leaves(read_torch_file(root / file))) for root in (written, expected))
        args, their_args = vars(ours.pop("/args")), vars(theirs.pop("/args"))
        assert {name: args.get(name) for name in their_args} == their_args
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, Tensor):
                assert ours[key].dtype == value.dtype, (file, key)
                assert torch.equal(ours[key], value), (file, key)
            else:
                assert ours[key] == value, (file, key)


def plan_for(source: Any, spelling: Spelling, **options: Any) -> LegacyTreePlan:
    layout = ParallelLayout(tp=spelling.tp, pp=spelling.pp)
    return plan_legacy_tree(source, layout, num_chunks=spelling.virtual, **options)


@pytest.mark.parametrize("spelling", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_written_tree_is_the_one_that_training_writes_and_is_read_back(tmp_path, model, spelling):
    weights = random_weights(model)
    expected = write_tree(tmp_path / "theirs", model, weights, spelling)
    # 131 tokens on one rank, padded to 256 as on two.
    multiple = spelling.padded // spelling.tp
    plan = plan_for(MemorySource(model, weights), spelling, vocabulary_multiple=multiple)
    folder = write_legacy_tree(plan, tmp_path / "ours")
    assert folder == tmp_path / "ours" / "iter_0000100"
    assert_same_tree(folder, expected)
    source = open_source(tmp_path / "ours")
    assert source.model_config() == model
    for name, tensor in weights.items():
        assert torch.equal(source.read(f"model.{name}", (0,) * tensor.ndim, tensor.shape), tensor), name


def test_one_key_head_for_all_queries_stays_on_one_tensor_rank(tmp_path):
    weights = random_weights(FALCON_7B)
    expected = write_tree(tmp_path / "theirs", FALCON_7B, weights, Spelling(pp=2))
    source = MemorySource(FALCON_7B, weights)
    folder = write_legacy_tree(plan_for(source, Spelling(pp=2), vocabulary_multiple=256), tmp_path / "ours")
    assert_same_tree(folder, expected)
    with pytest.raises(ConfigError, match="size 2: Megatron-LLM cannot cut num_attention_heads_kv 1 so; use a divisor"):
        plan_for(source, Spelling(tp=2))


def test_the_arguments_are_enough_without_the_model_that_is_recorded_beside_them(tmp_path):
    for number, model in enumerate([*MODELS.values(), FALCON_7B]):
        root = tmp_path / str(number)
        file = write_legacy_tree(plan_for(MemorySource(model, random_weights(model)), Spelling()), root)
        file = file / "mp_rank_00" / "model_optim_rng.pt"
        state = torch.load(file, weights_only=False)
        del state["args"].model_config
        torch.save(state, file)
        assert LegacySource(root).model_config() == model


# What the families beyond Megatron-LLM's have, together where they go together.
BEYOND: dict[str, tuple[ModelConfig, list[str]]] = {
    "qwen3": (dataclasses.replace(LLAMA, qk_layernorm=True), ["qk_layernorm"]),
    "qwen2": (dataclasses.replace(LLAMA, qkv_bias=True), ["biases on some of the linears"]),
    "gemma": (
        dataclasses.replace(
            LLAMA, glu_activation="geglu_tanh", apply_layernorm_1p=True, scale_embeddings=True, tie_embed_logits=True
        ),
        ["apply_layernorm_1p", "scale_embeddings", "geglu_tanh"],
    ),
    "llama3": (
        dataclasses.replace(LLAMA, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),
        ["rope scaling other than linear"],
    ),
    "gpt without biases": (
        dataclasses.replace(GPT, qkv_bias=False, attention_output_bias=False, mlp_bias=False),
        ["gelu_tanh without a bias"],
    ),
}


@pytest.mark.parametrize("model, names", BEYOND.values(), ids=BEYOND)
def test_models_that_megatron_llm_does_not_know_come_back_as_well_and_the_log_says_so(tmp_path, caplog, model, names):
    weights = random_weights(model)
    if model.qk_layernorm:
        weights |= {f"layers.{i}.attention.{part}_norm.weight": torch.randn(6) for i in range(4) for part in "qk"}
    spelling = Spelling(tp=2, pp=2)
    with caplog.at_level(logging.WARNING):
        write_legacy_tree(plan_for(MemorySource(model, weights), spelling), tmp_path)
    width = [] if model.position_embedding_type == "absolute" else ["rotary heads of a width of their own"]
    assert f"it does not know {', '.join(names + width)}" in caplog.text
    source = LegacySource(tmp_path)
    assert source.model_config() == model
    assert set(source.names()) == {f"model.{name}" for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(source.read(f"model.{name}", (0,) * tensor.ndim, tensor.shape), tensor), name


def test_norms_of_heads_are_ordered_as_the_heads_are(tmp_path):
    """Dimension 1 of a head of six lies beside dimension 4, its partner in the rotation: 0 3 1 4 2 5."""
    model = dataclasses.replace(LLAMA, qk_layernorm=True)
    weights = random_weights(model)
    weights |= {f"layers.{i}.attention.{part}_norm.weight": torch.arange(6.0) for i in range(4) for part in "qk"}
    folder = write_legacy_tree(plan_for(MemorySource(model, weights), Spelling()), tmp_path)
    state = read_torch_file(folder / "mp_rank_00" / "model_optim_rng.pt")
    stored = state["model"]["language_model"]["encoder"]["layers.0.self_attention.q_layernorm.weight"]
    assert stored.tolist() == [0, 3, 1, 4, 2, 5]


def test_a_published_model_is_known_to_megatron_llm():
    plain = {"kv_channels": 5, "num_attention_heads": 4}
    assert beyond_megatron_llm(dataclasses.replace(LLAMA, **plain)) == []
    assert beyond_megatron_llm(dataclasses.replace(FALCON_40B, **plain)) == []
    assert beyond_megatron_llm(dataclasses.replace(LLAMA, **plain, rope_scaling=RopeScaling("linear", 2.0))) == []
    assert beyond_megatron_llm(GPT) == []


def test_weights_without_a_run_are_a_release_in_the_dtype_that_is_asked_for(tmp_path):
    weights = random_weights(LLAMA)
    source = MemorySource(LLAMA, weights, iteration=None)
    written: list[int] = []
    plan = plan_for(source, Spelling(tp=2), weights_dtype=torch.bfloat16)
    folder = write_legacy_tree(plan, tmp_path, on_bytes=written.append)
    assert sum(written) == plan.num_bytes
    assert folder.name == (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    state = read_torch_file(folder / "mp_rank_00" / "model_optim_rng.pt")
    assert (state["iteration"], state["args"].bf16, state["args"].params_dtype) == ("release", True, torch.bfloat16)
    read = LegacySource(tmp_path)
    assert read.state() is None
    name = "model.layers.3.mlp.gate.weight"
    assert torch.equal(read.read(name, (0, 0), (28, 20)), weights["layers.3.mlp.gate.weight"].bfloat16())


def test_everything_that_use_checkpoint_args_takes_is_recorded(tmp_path):
    """The names are those of Megatron-LLM's --use_checkpoint_args and of the check that follows."""
    write_legacy_tree(plan_for(MemorySource(LLAMA, random_weights(LLAMA)), Spelling(pp=2, virtual=2)), tmp_path)
    args = read_torch_file(tmp_path / "iter_0000100/mp_rank_00_001/model_optim_rng.pt")["args"]
    taken = {"padded_vocab_size", "position_embedding_type", "parallel_attn", "parallel_layernorm", "use_rms_norm"}
    taken |= {"tie_embed_logits", "make_vocab_size_divisible_by", "tensor_model_parallel_size"}
    taken |= {"pipeline_model_parallel_size", "num_layers", "hidden_size", "ffn_hidden_size", "seq_length"}
    taken |= {"num_attention_heads", "num_attention_heads_kv", "kv_channels", "max_position_embeddings"}
    taken |= {"tokenizer_type", "glu_activation", "sliding_window_size", "num_layers_per_virtual_pipeline_stage"}
    taken |= {"hidden_dropout", "bias_gelu_fusion", "consumed_train_samples", "consumed_valid_samples"}
    assert taken <= vars(args).keys()
    assert args.num_layers_per_virtual_pipeline_stage == 1
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by) == (256, 128)


def test_the_name_and_the_tokenizer_of_a_model_go_with_it(tmp_path, monkeypatch):
    (tmp_path / "sentences.model").write_bytes(b"pieces")
    source = MemorySource(LLAMA, random_weights(LLAMA))
    identity = TokenizerIdentity("SentencePieceTokenizer", str(tmp_path / "sentences.model"))
    monkeypatch.setattr(source, "tokenizer", lambda: identity)
    write_legacy_tree(plan_for(source, Spelling(), model_name="llama2"), tmp_path / "tree")
    returned = LegacySource(tmp_path / "tree")
    tokenizer = returned.tokenizer()
    assert returned.model_name() == "llama2"
    assert tokenizer is not None
    assert Path(tokenizer.tokenizer_model) == tmp_path / "tree" / "tokenizer.model"
    assert Path(tokenizer.tokenizer_model).read_bytes() == b"pieces"


def test_the_tokenizer_of_another_model_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    (tmp_path / "sentences.model").write_bytes(b"pieces")
    source = MemorySource(LLAMA, random_weights(LLAMA))
    identity = TokenizerIdentity("SentencePieceTokenizer", str(tmp_path / "sentences.model"))
    monkeypatch.setattr(source, "tokenizer", lambda: identity)
    root = tmp_path / "trees"
    root.mkdir()
    held = root / "tokenizer.model"
    held.write_bytes(b"others")
    with pytest.raises(CheckpointError, match="trees/tokenizer.model is not the tokenizer of memory, which is .*/sent"):
        write_legacy_tree(plan_for(source, Spelling()), root)
    assert list(root.iterdir()) == [held]
    held.write_bytes(b"pieces")
    write_legacy_tree(plan_for(source, Spelling()), root)
    assert held.read_bytes() == b"pieces"


def test_optimizer_state_is_left_out_aloud(tmp_path, caplog):
    weights = random_weights(LLAMA)
    moment = {"optimizer.exp_avg.head.weight": weights["head.weight"]}
    with caplog.at_level(logging.WARNING):
        write_legacy_tree(plan_for(MemorySource(LLAMA, weights, **moment), Spelling()), tmp_path)
    assert "iter_0000100 holds weights only: the optimizer's state in memory is not written" in caplog.text


def test_what_cannot_be_a_tree_is_refused_before_anything_is_written():
    weights = random_weights(LLAMA)
    with pytest.raises(ConfigError, match="size 3: Megatron-LLM's pipeline ranks have equally many layers, and 4"):
        plan_for(MemorySource(LLAMA, weights), Spelling(pp=3))
    with pytest.raises(ConfigError, match="pipeline ranks of 4 virtual stages each have equally many layers, and 4"):
        plan_for(MemorySource(LLAMA, weights), Spelling(pp=2, virtual=4))
    missing = {name: tensor for name, tensor in weights.items() if name != "final_norm.weight"}
    with pytest.raises(
        CheckpointError, match="memory cannot be a tree of Megatron-LLM: model.final_norm.weight is miss"
    ):
        plan_for(MemorySource(LLAMA, missing), Spelling())
    with pytest.raises(CheckpointError, match="model.pooler.weight has no place in a tree"):
        plan_for(MemorySource(LLAMA, {**weights, "pooler.weight": torch.zeros(1)}), Spelling())


def test_nothing_is_overwritten(tmp_path):
    plan = plan_for(MemorySource(LLAMA, random_weights(LLAMA)), Spelling())
    write_legacy_tree(plan, tmp_path)
    with pytest.raises(CheckpointError, match="iter_0000100 exists already; remove it, or write to another folder"):
        write_legacy_tree(plan, tmp_path)


def test_a_folder_of_this_projects_checkpoints_is_left_to_them(tmp_path):
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "iter_0000001" / "manifest.json").touch()
    plan = plan_for(MemorySource(LLAMA, random_weights(LLAMA)), Spelling())
    with pytest.raises(
        CheckpointError, match=re.escape(f"{tmp_path} holds checkpoints of this project, whose tracker")
    ):
        write_legacy_tree(plan, tmp_path)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(state: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.torch, "save", fails)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\); nothing of it stays"):
        write_legacy_tree(plan_for(MemorySource(LLAMA, random_weights(LLAMA)), Spelling()), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype, num_chunks", [(torch.bfloat16, 2), (torch.float32, 1)], ids=["bf16, virtual", "fp32"])
def test_every_family_goes_from_hugging_face_through_a_tree_and_back_bit_for_bit(tmp_path, name, dtype, num_chunks):
    original = save_family(tmp_path / "hf", name, dtype=dtype)
    import_weights(open_source(original), tmp_path / "native", model_name=name.split()[0], on_bytes=lambda _: None)
    source = open_source(tmp_path / "native")
    assert isinstance(source, NativeSource)
    tp = 1 if source.model_config().num_attention_heads_kv == 1 else 2
    write_legacy_tree(plan_legacy_tree(source, ParallelLayout(tp=tp, pp=2), num_chunks=num_chunks), tmp_path / "tree")
    tree = open_source(tmp_path / "tree")
    assert isinstance(tree, LegacySource)
    assert tree.model_config() == source.model_config()
    reshard(plan_resharding(tree, ParallelLayout(tp=tp)), tmp_path / "again", on_bytes=lambda _: None)
    returned = open_source(tmp_path / "again")
    export = plan_export(returned)
    parts = split_by_size(export.tensors, 10**9)
    write_hf_folder(returned, export, parts, tmp_path / "back", other_files={}, on_bytes=lambda _: None)
    theirs, ours = stored_tensors(original), stored_tensors(tmp_path / "back")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key]), key
    assert loaded_config(original) == loaded_config(tmp_path / "back")
