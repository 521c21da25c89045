"""State dictionaries of other training programs: weights, moments and step are those that the program had."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from dcp_trees import edit_metadata, module_of, save_sharded_run, save_tree, step_with
from distributed import run_distributed
from hf_folders import FAMILIES, edit_json, save_family, save_llama, stored_tensors
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.state_dict_source import StateDictSource, open_dcp, open_torch_file
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError
from meta_folders import PARAMS, meta_state, random_weights

MOMENTS = ("exp_avg", "exp_avg_sq")


def whole(source, name):
    shape = source.shape(name)
    return source.read(name, (0,) * len(shape), shape)


def write_params(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


def trained():
    """Weights, gradients, and what AdamW makes of them on whole tensors in this project's order."""
    weights = random_weights(dtype=torch.float32)
    gradients = {name: torch.sin(7 * tensor) for name, tensor in weights.items()}
    model = module_of(weights)
    optimizer = step_with(model, gradients)
    named = dict(model.named_parameters())
    return weights, gradients, {name: p.detach() for name, p in named.items()}, optimizer.state, named


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "hf", dtype=torch.bfloat16)


@pytest.mark.parametrize("app", [False, True], ids=["torchtitan", "nested in app"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sharded_run_comes_over_with_weights_moments_and_step(world_size, app, tmp_path, caplog):
    weights, gradients, expected, moments, named = trained()
    folder = write_params(tmp_path / "checkpoint") / "step-1000"
    run_distributed(save_sharded_run, world_size, folder, meta_state(weights), meta_state(gradients), app)
    with caplog.at_level(logging.INFO):
        source = open_dcp(folder)
    for name, tensor in expected.items():
        assert torch.equal(whole(source, f"model.{name}"), tensor), name
        for moment in MOMENTS:
            assert torch.equal(whole(source, f"optimizer.{moment}.{name}"), moments[named[name]][moment]), name
    assert len(source.names()) == 3 * len(expected)
    state = source.state()
    assert (state.iteration, state.optimizer) == (2 if app else 1000, {"name": "adam", "num_steps": 2})
    assert "its place in the data is not known" in caplog.text
    assert (source.model_config().rope_theta, source.model_config().num_attention_heads_kv) == (1e4, 4)


def test_a_sharded_run_is_resharded_with_its_moments(tmp_path):
    weights, gradients, expected, moments, named = trained()
    folder = write_params(tmp_path / "tree")
    run_distributed(save_sharded_run, 2, folder, meta_state(weights), meta_state(gradients), False)
    plan = plan_resharding(open_source(folder), ParallelLayout(tp=2, pp=2))
    written = NativeSource(reshard(plan, tmp_path / "out", on_bytes=int))
    assert written.state().iteration == 1000
    for name, tensor in expected.items():
        assert torch.equal(whole(written, f"model.{name}"), tensor)
        for moment in MOMENTS:
            assert torch.equal(whole(written, f"optimizer.{moment}.{name}"), moments[named[name]][moment])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_what_its_hugging_face_folder_is(family, tmp_path):
    reference = HuggingFaceSource(save_family(tmp_path / "hf", family))
    tree = save_tree(tmp_path / "tree", {"model": stored_tensors(tmp_path / "hf")})
    source = open_dcp(tree, config=tmp_path / "hf")
    assert source.model_config() == reference.model_config()
    assert source.names() == reference.names()
    for name in source.names():
        assert source.dtype(name) == reference.dtype(name)
        assert torch.equal(whole(source, name), whole(reference, name)), name
    assert source.state().config == {"hf_config": json.loads((tmp_path / "hf" / "config.json").read_text())}


@pytest.mark.parametrize("prefix", ["", "model.", "app.model.", "module.", "state.net."])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "_checkpoint_wrapped_module."])
def test_prefixes_and_wrappers_of_modules_are_seen_through(prefix, wrapper, llama, tmp_path):
    state = {
        f"{prefix}{name.replace('self_attn.', 'self_attn.' + wrapper)}": t for name, t in stored_tensors(llama).items()
    }
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    source, reference = open_dcp(save_tree(tmp_path / "tree", state)), HuggingFaceSource(llama)
    for name in reference.names():
        assert torch.equal(whole(source, name), whole(reference, name))


def test_a_tied_head_and_old_buffers_are_no_tensors_of_the_model(tmp_path):
    folder = save_llama(tmp_path / "hf", tie_word_embeddings=True)
    state = stored_tensors(folder)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    source = open_dcp(save_tree(folder, state))
    assert source.names() == HuggingFaceSource(folder).names()
    state["lm_head.weight"] += 1
    with pytest.raises(CheckpointError, match=r"model that config.json describes: lm_head.weight has no place"):
        open_dcp(save_tree(folder, state))


def test_a_run_with_metas_names_may_be_described_by_hugging_faces_file(tmp_path):
    weights = random_weights()
    save_tree(tmp_path, meta_state(weights))
    write_params(tmp_path)
    expected = open_dcp(tmp_path).model_config()
    (tmp_path / "params.json").unlink()
    keys = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 132,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 140,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    source = open_dcp(tmp_path)
    assert source.model_config() == expected
    for name, tensor in weights.items():
        assert torch.equal(whole(source, f"model.{name}"), tensor)


def _adam_state(state):
    """What AdamW has after seven steps."""
    moments = {
        name: {"exp_avg": t.float(), "exp_avg_sq": t.float() ** 2, "step": torch.tensor(7.0)}
        for name, t in state.items()
    }
    return {"model": state, "optim": {"state": moments, "param_groups": [{"lr": 0.1, "params": list(state)}]}}


def test_llama_recipes_trees_come_over_with_their_optimizer(llama, tmp_path):
    """Sharded saves of llama-recipes: names of Hugging Face below "model", Adam's state by name below "optim"."""
    state = stored_tensors(llama)
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    source = open_dcp(save_tree(tmp_path / "fine-tuned-llama", _adam_state(state)))
    assert source.state().iteration == source.state().optimizer["num_steps"] == 7
    up = state["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(whole(source, "optimizer.exp_avg_sq.layers.1.mlp.up.weight"), up.float() ** 2)
    assert torch.equal(source.read("model.layers.1.mlp.up.weight", (3, 5), (20, 7)), up[3:23, 5:12])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda s: s.pop("exp_avg"), r"optim.state.model.norm.weight.exp_avg is missing"),
        (lambda s: s.update(exp_avg=torch.ones(3)), r"exp_avg has another shape than model.norm.weight"),
        (lambda s: s.update(step=torch.tensor(8.0)), r"tensors differ in their number of steps"),
        (lambda s: s.update(step=8), r"optim.state.model.norm.weight.step is missing or no tensor"),
    ],
)
def test_an_optimizers_state_that_is_not_adams_of_every_tensor_is_left_out_and_said(
    edit, reason, llama, tmp_path, caplog
):
    saved = _adam_state(stored_tensors(llama))
    edit(saved["optim"]["state"]["model.norm.weight"])
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    with caplog.at_level(logging.WARNING):
        source = open_dcp(save_tree(tmp_path, saved))
    assert "weights only" in caplog.text and re.search(reason, caplog.text)
    assert source.names() == HuggingFaceSource(llama).names()
    assert source.state().iteration == 0


def test_without_a_description_the_model_is_asked_for_and_llama_recipes_names_it(llama, tmp_path):
    tree = save_tree(tmp_path / "runs" / "tree", {"model": stored_tensors(llama)})
    with pytest.raises(CheckpointError, match=r"put the config.json of the Hugging Face model that was trained there"):
        open_dcp(tree)
    (tree / "train_params.yaml").write_text(
        "run_validation: 'True'\nmodel_name: meta-llama/Llama-2-7b-hf\nseed: '42'\n"
    )
    with pytest.raises(
        CheckpointError, match=r"put the config.json of meta-llama/Llama-2-7b-hf, which train_params.yaml"
    ):
        open_dcp(tree)
    with pytest.raises(CheckpointError, match=r"there is no config.json or params.json in .*nowhere"):
        open_dcp(tree, config=tmp_path / "nowhere")
    for config in (llama, llama / "config.json"):
        assert len(open_dcp(tree, config=config).names()) == len(stored_tensors(llama))


def test_a_description_of_another_model_is_named(llama, tmp_path):
    tree = save_tree(tmp_path / "tree", {"model": stored_tensors(llama)})
    shutil.copyfile(llama / "config.json", tree / "config.json")
    edit_json(tree / "config.json", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"model.layers.3.input_layernorm.weight is missing; .*; and 1 more"):
        open_dcp(tree)
    (tree / "config.json").unlink()
    write_params(tree)
    with pytest.raises(
        CheckpointError, match=r"has no tok_embeddings.weight, so that its tensors are not those that .*params.json"
    ):
        open_dcp(tree)
    save_family(tmp_path / "gpt2", "gpt2")
    with pytest.raises(
        CheckpointError, match=r"has neither transformer.wte.weight, as .*config.json says, nor tok_embeddings"
    ):
        open_dcp(tree, config=tmp_path / "gpt2")


def test_several_models_in_one_tree_are_an_error_unless_one_is_in_the_usual_place(llama, tmp_path):
    state = stored_tensors(llama)
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    source = open_dcp(save_tree(tmp_path / "a", {"model": state, "averaged": averaged}))
    assert torch.equal(whole(source, "model.final_norm.weight"), state["model.norm.weight"])
    with pytest.raises(CheckpointError, match=r"holds several models \(student.model.embed_tokens.weight; teacher"):
        open_dcp(save_tree(tmp_path / "b", {"student": state, "teacher": averaged}))
    twice = {"model": {**state, "_orig_mod.model.norm.weight": state["model.norm.weight"]}}
    with pytest.raises(CheckpointError, match=r"holds model.model.norm.weight twice, once in a wrapped module"):
        open_dcp(save_tree(tmp_path / "c", twice))


def test_of_a_folder_of_steps_the_latest_complete_one_is_opened_or_the_one_asked_for(tmp_path):
    weights = random_weights()
    write_params(tmp_path)
    for step in (5, 10, 100):
        save_tree(tmp_path / f"step-{step}", {**meta_state(weights), "n": torch.tensor(step)})
    (tmp_path / "step-100" / ".metadata").unlink()
    assert open_source(tmp_path).path == tmp_path / "step-10"
    assert open_source(tmp_path, 5).path == tmp_path / "step-5"
    with pytest.raises(CheckpointError, match=r"--load_iters 100: .* holds no such tree .*; found 5, 10"):
        open_source(tmp_path, 100)
    with pytest.raises(
        CheckpointError, match=r"--load_iters 5: .*step-10 is one checkpoint; drop it or give the folder above"
    ):
        open_source(tmp_path / "step-10", 5)
    with pytest.raises(CheckpointError, match=r"holds no such tree of torch.distributed.checkpoint; found none"):
        open_dcp(tmp_path / "step-100")


def test_a_tree_beside_its_config_is_a_tree_and_not_a_hugging_face_folder(llama, tmp_path):
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    save_tree(tmp_path, {"model": stored_tensors(llama)})
    assert isinstance(open_source(tmp_path), StateDictSource)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {name: nn.Parameter(tensor) for name, tensor in state.items()},
        lambda state: {"model": state, "args": argparse.Namespace(lr=np.float64(0.1)), "device": torch.device("cpu")},
        lambda state: {"model": state, "seen": np.arange(3), "dtype": torch.bfloat16, "shape": torch.Size((2, 3))},
    ],
    ids=["plain", "nested", "parameters", "with arguments", "with arrays"],
)
def test_a_single_file_with_a_full_state_dictionary_is_a_source(wrap, llama, tmp_path):
    """What llama-recipes and FSDP scripts save as FULL_STATE_DICT."""
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    state = stored_tensors(llama)
    torch.save(wrap(state), tmp_path / "llama-0.pt")
    source, reference = open_source(tmp_path / "llama-0.pt"), HuggingFaceSource(llama)
    assert source.names() == reference.names()
    for name in reference.names():
        assert torch.equal(whole(source, name), whole(reference, name))


def test_a_single_file_has_no_iterations(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"--load_iters 3: .*model.pt is a file with one model; drop it"):
        open_source(tmp_path / "model.pt", 3)


def test_a_single_file_that_would_run_a_program_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    torch.save({"weight": torch.ones(2), "x": Malicious()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="system"):
        open_torch_file(tmp_path / "model.pt")
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_beside_the_tree_or_its_description_is_the_models(llama, tmp_path):
    tree = save_tree(tmp_path / "tree", {"model": stored_tensors(llama)})
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    assert open_dcp(tree).tokenizer() is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_dcp(tree).tokenizer().tokenizer_model == str(tmp_path)
    (tree / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert open_dcp(tree).tokenizer().tokenizer_model == str(tree / "tokenizer.model")


def test_damage_is_named_when_the_source_is_opened(llama, tmp_path):
    tree = save_tree(tmp_path, {"model": stored_tensors(llama)})
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    edit_metadata(tree, lambda metadata: metadata.state_dict_metadata.pop("model.model.norm.weight") and None)
    with pytest.raises(CheckpointError, match=r"model.norm.weight is missing"):
        open_source(tree)
