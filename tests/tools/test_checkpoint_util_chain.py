"""What training saved comes out of a chain of layouts as the very files it was, and training goes on from it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from finetune_runs import assert_same_bits, command, finetune_succeeds, stored_entries, write_tokens
from megatron.checkpoint.diff import compare
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.opening import open_source
from megatron.training.sinks import METRICS_FILE, read_metrics

SCRIPT = Path(__file__).parents[2] / "tools" / "checkpoint_util.py"
TP, PP, VIRTUAL = (
    f"--target_{name}"
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "num_layers_per_virtual_pipeline_stage")
)
# Key/value heads have two copies under TP4; eight layers on four ranks with two stages each.
CHAIN = ((TP, 4), (PP, 4, VIRTUAL, 1), (), (TP, 2, PP, 2))
GRID = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1}
# Vocabulary rows are dealt out as the tool does it, so that files can be compared.
FLAGS = {"num_layers": 8, "make_vocab_size_divisible_by": 128, "eval_iters": 0, "bf16": None, "train_iters": 5, **GRID}


def rewrite(*words: object) -> None:
    spec = importlib.util.spec_from_file_location("checkpoint_util", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(word) for word in words])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What training saved on TP2 PP2 ZeRO-1 after three steps, and after each link of the chain."""
    root = tmp_path_factory.mktemp("chain")
    write_tokens(root / "tokens")
    finetune_succeeds(4, command(root / "tokens", save=root / "0", exit_interval=3, **FLAGS))
    for number, flags in enumerate(CHAIN):
        rewrite("--load_dir", root / str(number), "--save_dir", root / str(number + 1), *flags)
    return [root / str(number) for number in range(len(CHAIN) + 1)]


def test_weights_masters_moments_and_state_stay_the_same_bit_for_bit(folders: list[Path]) -> None:
    first, entries = open_source(folders[0]), stored_entries(folders[0])
    state = first.state()
    assert state is not None and state.consumed_samples == 12 and state.optimizer and state.scheduler and state.data
    assert {name.split(".")[0] for name in entries} == {"model", "optimizer"}
    for folder in folders[1:]:
        other = open_source(folder)
        assert_same_bits(stored_entries(folder), entries)
        assert (other.state(), other.model_config(), other.tokenizer()) == (
            (state, first.model_config(), first.tokenizer())
        )
        assert compare(first, other, on_bytes=lambda num_bytes: None).is_empty


def test_the_files_at_the_end_are_those_that_training_wrote(folders: list[Path]) -> None:
    first, last = (NativeSource(folder / "iter_0000003") for folder in (folders[0], folders[-1]))
    assert len(first.manifest.files) == 4
    assert last.manifest.files == first.manifest.files
    for name in first.manifest.files:
        assert (last.path / name).read_bytes() == (first.path / name).read_bytes()


def test_training_goes_on_as_if_nothing_had_happened(folders: list[Path]) -> None:
    data = folders[0].parent / "tokens"
    finetune_succeeds(4, *(command(data, save=f, load=f, **FLAGS) for f in (folders[0], folders[-1])))
    histories = [read_metrics(folder / METRICS_FILE)[-2:] for folder in (folders[0], folders[-1])]
    assert [line["iteration"] for line in histories[1]] == [4, 5]
    for name in ("lm_loss", "grad_norm"):
        assert [line[name] for line in histories[0]] == [line[name] for line in histories[1]]
    assert_same_bits(stored_entries(folders[-1]), stored_entries(folders[0]))
