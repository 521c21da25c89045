"""The optimizer's state of Megatron-LM and Megatron-LLM comes with the weights, each tensor with its parameter."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from legacy_trees import (
    BERT,
    FALCON_40B,
    GPT,
    LLAMA,
    Spelling,
    Weights,
    random_weights,
    rank_tensors,
    write_tree,
)
from megatron.checkpoint import open_source
from megatron.checkpoint.hf_export import plan_export
from megatron.checkpoint.legacy import LegacySource, plan_legacy_tree, write_legacy_tree
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.reshard import plan_resharding, reshard
from megatron.checkpoint.unpickle import read_torch_file
from megatron.core.layout import ParallelLayout
from megatron.model.config import ModelConfig

STATE = ("master", "exp_avg", "exp_avg_sq")


def logical_state(model: ModelConfig) -> dict[str, Weights]:
    weights = random_weights(model)
    return {
        kind: {name: tensor * (number + 1) for name, tensor in weights.items()} for number, kind in enumerate(STATE)
    }


class Holder(nn.Module):
    """A module whose parameters and children are what is registered."""

    def hold(self, path: list[str], tensor: Tensor) -> None:
        if len(path) == 1:
            self.register_parameter(path[0], nn.Parameter(tensor))
            return
        if path[0] not in self._modules:
            self.add_module(path[0], Holder())
        self._modules[path[0]].hold(path[1:], tensor)  # type: ignore[union-attr, operator]


def module_of(flat: Weights, *, head_is_parameter: bool) -> nn.Module:
    """A rank's model chunk, registered in the programs' order: torch itself says how its parameters are numbered."""
    root = Holder()
    root.add_module("language_model", Holder())
    # The heads of a BERT are made when everything else is, and stored before the copy of the embedding.
    bert_heads = [key for key in flat if key.startswith(("lm_head.", "binary_head."))]
    for key in [*(key for key in flat if key not in bert_heads), *bert_heads]:
        if key == "lm_head":
            path = ["language_model", "lm_head"] if head_is_parameter else ["language_model", "output_layer", "weight"]
        elif key == "word_embeddings_for_head.weight":
            path = ["word_embeddings", "weight"]
        elif key in bert_heads:
            path = key.split(".")
        else:
            path = ["language_model", *key.split(".")]
        root.hold(path, flat[key])
    return root


def optimizer_of(chunks: dict[str, list[Weights]], *, dtype: torch.dtype, head_is_parameter: bool) -> dict[str, Any]:
    """The saved state of a rank with these tensors, as torch's AdamW numbers them in the programs' two groups."""
    modules = {
        kind: [module_of(flat, head_is_parameter=head_is_parameter) for flat in held] for kind, held in chunks.items()
    }
    named = {
        kind: [parameter for module in held for _, parameter in module.named_parameters()]
        for kind, held in modules.items()
    }
    masters = named["master"]
    groups = [group for group in ([p for p in masters if p.ndim > 1], [p for p in masters if p.ndim == 1]) if group]
    adam = torch.optim.AdamW([{"params": group} for group in groups])
    for master, average, square in zip(*(named[kind] for kind in STATE), strict=True):
        adam.state[master] = {"step": torch.tensor(7.0), "exp_avg": average.data, "exp_avg_sq": square.data}
    if dtype == torch.float32:
        return adam.state_dict()
    return {"optimizer": adam.state_dict(), "fp32_from_fp16_params": groups}


def write_trained(
    root: Path, model: ModelConfig, spelling: Spelling, *, dtype: torch.dtype, head_is_parameter: bool = True
) -> dict[str, Weights]:
    """A tree with optimizer state; returns the logical tensors of each kind."""
    state = logical_state(model)
    weights = {name: tensor.to(dtype) for name, tensor in state["master"].items()}
    folder = write_tree(root, model, weights, spelling)
    for p in range(spelling.pp):
        for t in range(spelling.tp):
            file = folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if spelling.pp > 1 else "")) / "model_optim_rng.pt"
            chunks = {kind: rank_tensors(model, state[kind], spelling, p, t) for kind in STATE}
            optimizer = optimizer_of(chunks, dtype=dtype, head_is_parameter=head_is_parameter)
            edit(file, lambda saved, optimizer=optimizer: saved.update(optimizer=optimizer))
    return {
        "model": state["master"],
        "optimizer.exp_avg": state["exp_avg"],
        "optimizer.exp_avg_sq": state["exp_avg_sq"],
    }


def edit(file: Path, change: Any) -> None:
    saved = torch.load(file, weights_only=False)
    change(saved)
    torch.save(saved, file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    "spelling",
    [Spelling(), Spelling(tp=2, pp=2), Spelling(tp=2, pp=2, virtual=2)],
    ids=["TP1", "TP2 PP2", "interleaved"],
)
@pytest.mark.parametrize("model", [LLAMA, FALCON_40B, GPT, BERT], ids=["llama", "falcon 40b", "gpt", "bert"])
def test_masters_and_moments_are_read_as_logical_tensors(tmp_path, model, spelling, dtype):
    expected = write_trained(tmp_path, model, spelling, dtype=dtype)
    source = open_source(tmp_path)
    assert set(source.names()) == {f"{kind}.{name}" for kind, tensors in expected.items() for name in tensors}
    for kind, tensors in expected.items():
        for name, tensor in tensors.items():
            entry = f"{kind}.{name}"
            assert source.dtype(entry) == torch.float32
            assert torch.equal(source.read(entry, (0,) * tensor.ndim, tensor.shape), tensor), entry
    state = source.state()
    assert state is not None
    assert state.optimizer == {"name": "adam", "num_steps": 7}
    assert (state.iteration, state.consumed_samples, state.seed) == (100, 6400, None)


@pytest.mark.parametrize("pp", [1, 2])
def test_a_head_that_is_a_module_is_numbered_last(tmp_path, pp):
    expected = write_trained(tmp_path, LLAMA, Spelling(tp=2, pp=pp), dtype=torch.float16, head_is_parameter=False)
    source = LegacySource(tmp_path)
    for name in ("head.weight", "embedding.word.weight", "layers.3.mlp.gate.weight"):
        tensor = expected["optimizer.exp_avg"][name]
        assert torch.equal(source.read(f"optimizer.exp_avg.{name}", (0, 0), tensor.shape), tensor)


def groups_of(saved: dict[str, Any]) -> list[Any]:
    return saved["optimizer"]["optimizer"]["param_groups"]


def swap(saved: dict[str, Any]) -> None:
    """Two masters of one shape change places: layers 0 and 1 have alike MLPs."""
    masters = saved["optimizer"]["fp32_from_fp16_params"][0]
    masters[5], masters[9] = masters[9], masters[5]


UNREADABLE = {
    "another order": (swap, r"its fp32 values are not those of encoder.layers.\d.mlp.dense_4h_to_h.weight"),
    "no tensors": (
        lambda saved: saved["optimizer"]["optimizer"].update(state={}),
        "a distributed optimizer keeps it in files of its own",
    ),
    "another form": (lambda saved: saved.update(optimizer=[1]), "it is in no form that is known"),
    "a parameter without state": (
        lambda saved: saved["optimizer"]["optimizer"]["state"].pop(3),
        "it does not have something for every parameter",
    ),
    "state that is no record": (
        lambda saved: saved["optimizer"]["optimizer"]["state"].update({3: 1}),
        "it is in no form that is known",
    ),
    "another optimizer": (
        lambda saved: [entry.pop("exp_avg_sq") for entry in saved["optimizer"]["optimizer"]["state"].values()],
        "it is neither that of Adam nor of SGD with momentum",
    ),
    "a parameter too few": (
        lambda saved: groups_of(saved)[1]["params"].pop(),
        "its tensors are not those of the model's parameters",
    ),
    "no masters": (
        lambda saved: saved["optimizer"].pop("fp32_from_fp16_params"),
        "its fp32 values are not those of the model's parameters",
    ),
    "masters that are no tensors": (
        lambda saved: saved["optimizer"].update(fp32_from_fp16_params=[[1]]),
        "its fp32 values are in no form that is known",
    ),
    "different steps": (
        lambda saved: saved["optimizer"]["optimizer"]["state"][0].update(step=3),
        "its parameters have made different numbers of steps",
    ),
}


@pytest.mark.parametrize("change, reason", UNREADABLE.values(), ids=UNREADABLE)
def test_a_state_that_is_not_proven_is_left_out_and_the_log_says_why(tmp_path, caplog, change, reason):
    expected = write_trained(tmp_path, LLAMA, Spelling(), dtype=torch.bfloat16)
    edit(tmp_path / "iter_0000100/mp_rank_00/model_optim_rng.pt", change)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert set(source.names()) == {f"model.{name}" for name in expected["model"]}
    assert source.dtype("model.head.weight") == torch.bfloat16
    state = source.state()
    assert state is not None
    assert state.optimizer == {}
    assert re.search(r"the optimizer's state is not read \(mp_rank_00: " + reason, caplog.text)


def test_ranks_of_different_steps_are_not_read_together(tmp_path):
    write_trained(tmp_path, LLAMA, Spelling(tp=2), dtype=torch.bfloat16)

    def later(saved: dict[str, Any]) -> None:
        for entry in saved["optimizer"]["optimizer"]["state"].values():
            entry["step"] = torch.tensor(8.0)

    edit(tmp_path / "iter_0000100/mp_rank_01/model_optim_rng.pt", later)
    notes = LegacySource(tmp_path).notes
    assert any("is not read (the files are of different optimizers or steps)" in note for note in notes)


def test_the_files_of_a_distributed_optimizer_hold_the_weights_at_least(tmp_path):
    weights = random_weights(LLAMA)
    file = write_tree(tmp_path, LLAMA, weights, Spelling()) / "mp_rank_00" / "model_optim_rng.pt"
    file.rename(file.with_name("model_rng.pt"))
    source = LegacySource(tmp_path)
    assert torch.equal(source.read("model.head.weight", (0, 0), (131, 20)), weights["head.weight"])
    assert any("is not read (a distributed optimizer keeps it in files of its own)" in note for note in source.notes)


def test_a_step_may_be_counted_for_a_group_and_sgd_counts_none(tmp_path):
    write_trained(tmp_path, LLAMA, Spelling(), dtype=torch.bfloat16)
    file = tmp_path / "iter_0000100/mp_rank_00/model_optim_rng.pt"

    def as_apex(saved: dict[str, Any]) -> None:
        for group in groups_of(saved):
            group["step"] = 9
        for entry in saved["optimizer"]["optimizer"]["state"].values():
            del entry["step"]

    edit(file, as_apex)
    state = LegacySource(tmp_path).state()
    assert state is not None
    assert state.optimizer == {"name": "adam", "num_steps": 9}

    def as_sgd(saved: dict[str, Any]) -> None:
        for group in groups_of(saved):
            del group["step"]
        for entry in saved["optimizer"]["optimizer"]["state"].values():
            entry["momentum_buffer"] = entry.pop("exp_avg")
            del entry["exp_avg_sq"]

    edit(file, as_sgd)
    source = LegacySource(tmp_path)
    state = source.state()
    assert state is not None
    assert state.optimizer == {"name": "sgd", "num_steps": 100}
    assert "optimizer.momentum_buffer.head.weight" in source.names()


def test_the_whole_state_moves_into_a_checkpoint_of_this_project(tmp_path):
    expected = write_trained(tmp_path / "tree", LLAMA, Spelling(tp=2, pp=2), dtype=torch.bfloat16)
    plan = plan_resharding(open_source(tmp_path / "tree"), ParallelLayout(tp=1, pp=4))
    reshard(plan, tmp_path / "native", on_bytes=lambda _: None)
    source = open_source(tmp_path / "native")
    assert isinstance(source, NativeSource)
    assert source.state() == open_source(tmp_path / "tree").state()
    for kind, tensors in expected.items():
        for name, tensor in tensors.items():
            read = source.read(f"{kind}.{name}", (0,) * tensor.ndim, tensor.shape)
            assert torch.equal(read, tensor), (kind, name)


PRECISIONS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "bf16": ({"bf16": True, "fp16": False}, torch.bfloat16),
    "fp16": ({"bf16": False, "fp16": True}, torch.float16),
    "the dtype of parameters": ({"params_dtype": torch.bfloat16}, torch.bfloat16),
    "fp32": ({"bf16": False, "fp16": False, "params_dtype": torch.float32}, torch.float32),
}


@pytest.mark.parametrize("args, dtype", PRECISIONS.values(), ids=PRECISIONS)
def test_masters_are_exported_as_what_their_run_computed_in(tmp_path, args, dtype):
    """To both formats; and by way of a checkpoint of this project, which keeps the masters."""
    expected = write_trained(tmp_path / "tree", LLAMA, Spelling(args=args), dtype=dtype)["model"]
    tree = open_source(tmp_path / "tree")
    reshard(plan_resharding(tree, ParallelLayout()), tmp_path / "native", on_bytes=lambda _: None)
    for source in (tree, open_source(tmp_path / "native")):
        assert source.dtype("model.head.weight") == torch.float32
        export = plan_export(source)
        assert {tensor.dtype for tensor in export.tensors} == {dtype}
        assert export.json_files["config.json"]["torch_dtype"] == str(dtype).removeprefix("torch.")
    folder = write_legacy_tree(plan_legacy_tree(tree, ParallelLayout()), tmp_path / "again")
    written = read_torch_file(folder / "mp_rank_00" / "model_optim_rng.pt")["args"]
    assert written.params_dtype == dtype
    assert (written.bf16, written.fp16) == (dtype == torch.bfloat16, dtype == torch.float16)
    again = LegacySource(tmp_path / "again")
    for name, tensor in expected.items():
        read = again.read(f"model.{name}", (0,) * tensor.ndim, tensor.shape)
        assert read.dtype == dtype
        assert torch.equal(read, tensor.to(dtype)), name


def test_a_dtype_that_is_asked_for_is_written_to_a_tree_whatever_the_run_computed_in(tmp_path):
    write_trained(tmp_path, LLAMA, Spelling(args={"bf16": True}), dtype=torch.bfloat16)
    plan = plan_legacy_tree(open_source(tmp_path), ParallelLayout(), weights_dtype=torch.float32)
    assert plan.weights_dtype == torch.float32
