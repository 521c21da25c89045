"""Every family through the commands that a user types: there, split for four ranks, and back, without a bit lost."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_folders import FAMILIES, loaded_config, save_family, stored_tensors
from megatron.checkpoint.opening import open_source
from tiny_tokenizers import TEXT, write_huggingface

REPOSITORY = Path(__file__).parents[2]
# A generation of each family that its weights could belong to.
MODEL_NAMES = {"llama": "llama2", "llama 3.2": "llama3"}
# Models that Megatron-LLM, or for a BERT Megatron-LM, has a program for, and TP x PP of the tree,
# where one key/value head cannot be cut.
LEGACY = {"llama": (2, 2), "mistral": (2, 2), "falcon 7b": (1, 4), "falcon 40b": (2, 2), "bert": (2, 2)}


def main_of(script: str) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location(Path(script).stem, REPOSITORY / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


hf_to_megatron = main_of("weights_conversion/hf_to_megatron.py")
megatron_to_hf = main_of("weights_conversion/megatron_to_hf.py")
checkpoint_util = main_of("tools/checkpoint_util.py")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    # Gemma's own class would want Gemma's own pieces.
    return write_huggingface(
        folder, bos_token="<|begin|>", eos_token="<|end|>", tokenizer_class="PreTrainedTokenizerFast"
    )


def model_folder(folder: Path, family: str, tokenizer: Path, **overrides: Any) -> Path:
    save_family(folder, family, dtype=torch.bfloat16, max_shard_size="40KB", **overrides)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    differ = [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])]
    assert differ == []
    assert [name for name, tensor in theirs.items() if tensor.dtype != ours[name].dtype] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_back_is_what_went_in(family: str, tokenizer: Path, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", family, tokenizer)
    name = MODEL_NAMES.get(family, family.split(" ")[0])
    hf_to_megatron(name, "--out", tmp_path / "native", "--model-path", model)
    sizes = ["--target_tensor_parallel_size=2", "--target_pipeline_parallel_size=2"]
    checkpoint_util("--load_dir", tmp_path / "native", "--save_dir", tmp_path / "split", "--model_type", name, *sizes)
    megatron_to_hf("--input_dir", tmp_path / "split", "--output_dir", tmp_path / "back", "--model", name)
    assert len(list(open_source(tmp_path / "split").path.glob("rank_*.safetensors"))) == 4
    assert_equal(stored_tensors(tmp_path / "back"), stored_tensors(model))
    assert loaded_config(tmp_path / "back") == loaded_config(model)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "back", model))
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids and ours.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize("family", LEGACY)
def test_a_tree_of_megatron_llm_on_the_way_loses_nothing(family: str, tokenizer: Path, tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model", family, tokenizer)
    name = MODEL_NAMES.get(family, family.split(" ")[0])
    tp, pp = LEGACY[family]
    sizes = [f"--target_tensor_parallel_size={tp}", f"--target_pipeline_parallel_size={pp}", "--model_type", name]
    checkpoint_util("--load_dir", model, "--save_dir", tmp_path / "tree", "--saver", "megatron_legacy", *sizes)
    assert len(list((tmp_path / "tree").rglob("mp_rank_*"))) == 4
    megatron_to_hf("--input_dir", tmp_path / "tree", "--output_dir", tmp_path / "back", "--vocab_file", tokenizer)
    assert_equal(stored_tensors(tmp_path / "back"), stored_tensors(model))
