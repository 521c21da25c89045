"""hf -> megatron -> TP2 PP2 -> TP1 PP4 -> TP1 PP1 -> hf, by the commands that users type."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from finetune_runs import script_main
from hf_folders import VARIANTS, loaded_config, save_llama, stored_tensors
from megatron.checkpoint.opening import open_source
from reference import logits_of, serial_stage

# Large enough that every part of the model matters, and small enough that fp32 tells rounding from a mistake.
STD = 0.3


@pytest.fixture(scope="module")
def commands():
    scripts = (
        "weights_conversion/hf_to_megatron.py",
        "tools/checkpoint_util.py",
        "weights_conversion/megatron_to_hf.py",
    )
    return [script_main(script) for script in scripts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chain_gives_back_every_bit_and_the_logits_are_those_of_transformers(variant, dtype, commands, tmp_path):
    to_megatron, reshard, to_hf = commands
    original = save_llama(tmp_path / "hf", dtype=dtype, **{**VARIANTS[variant], "num_hidden_layers": 5}, std=STD)
    to_megatron(["llama2", f"--out={tmp_path / '0'}", f"--model-path={original}"])
    for number, (tp, pp) in enumerate(((2, 2), (1, 4), (1, 1))):
        folders = ["--load_dir", str(tmp_path / str(number)), "--save_dir", str(tmp_path / str(number + 1))]
        sizes = ["--target_tensor_parallel_size", str(tp), "--target_pipeline_parallel_size", str(pp)]
        reshard([*folders, *sizes, "--model_type", "llama2"])
        assert len(list(tmp_path.glob(f"{number + 1}/iter_*/rank_*.safetensors"))) == tp * pp
    to_hf(["--input_dir", str(tmp_path / "3"), "--output_dir", str(tmp_path / "back")])

    stored, returned = stored_tensors(original), stored_tensors(tmp_path / "back")
    assert stored.keys() == returned.keys()
    assert all(
        stored[name].dtype == returned[name].dtype and torch.equal(stored[name], returned[name]) for name in stored
    )
    assert loaded_config(tmp_path / "back") == loaded_config(original)

    source = open_source(tmp_path / "3")
    ours = serial_stage(
        source.model_config(),
        lambda region: source.read(f"model.{region.name}", region.start, region.size).float(),
        dtype=torch.float32,
    )
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    tokens = torch.randint(131, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = theirs(tokens).logits, logits_of(ours, tokens)
    # Two orders of summation in fp32, relative to the largest logit.
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
