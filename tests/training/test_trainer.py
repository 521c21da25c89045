"""What a run saves when, what it starts from, and what makes it leave."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file

import finetune
from distributed import run_distributed
from finetune_runs import (
    FLAGS,
    GLOBAL_BATCH_SIZE,
    Ending,
    assert_same_bits,
    command,
    finetune_runs,
    finetune_succeeds,
    run_in_turn,
    stored_entries,
    write_tokens,
)
from hf_folders import save_llama
from megatron.checkpoint.locate import TRACKER_FILE, list_iterations
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.source import RunState
from megatron.config import parse_run
from megatron.data.loader import StepLoader
from megatron.errors import CheckpointError
from megatron.training.sinks import METRICS_FILE, read_metrics
from rank_process import REPOSITORY


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


def state_of(folder: Path, iteration: int | None = None) -> RunState:
    state = open_source(folder, iteration).state()
    assert state is not None
    return state


def losses(folder: Path) -> list[float | int | None]:
    return [line["lm_loss"] for line in read_metrics(folder / METRICS_FILE)]


def test_save_alone_saves_at_the_end_and_an_interval_between_as_well(data, tmp_path):
    finetune_succeeds(
        1,
        command(data, save=tmp_path / "end", train_iters=3),
        command(data, save=tmp_path / "between", train_iters=5, save_interval=2),
        command(data, save=tmp_path / "both", train_iters=4, save_interval=2),
    )
    assert list_iterations(tmp_path / "end") == [3]
    assert list_iterations(tmp_path / "between") == [2, 4, 5]
    assert list_iterations(tmp_path / "both") == [2, 4]


def test_without_evaluation_no_validation_data_is_needed(data, tmp_path):
    ending = finetune_runs(1, command(data, split="1", train_iters=2))[0][0]
    assert ending.status == 2 and "leaves none for valid" in ending.err
    (output,) = finetune_succeeds(1, command(data, split="1", train_iters=2, eval_iters=0))
    assert "validation " not in output


def test_validation_and_test_data_are_evaluated_when_due_and_at_the_end(data, tmp_path):
    finetune_succeeds(1, command(data, split="8,1,1", train_iters=5, eval_interval=2, save=tmp_path))
    lines = read_metrics(tmp_path / METRICS_FILE)
    assert [line["iteration"] for line in lines if "validation_loss" in line] == [2, 4, 5]
    assert [line["iteration"] for line in lines if "test_loss" in line] == [5]


def test_training_validation_and_test_may_have_data_of_their_own(data, tmp_path):
    """Every document of each: the validation loss of the same documents is the same whoever trains on what."""
    own = {"data_path": False, "split": False, "train_data_path": data, "train_iters": 2}
    both, train_only = tmp_path / "both", tmp_path / "train_only"
    finetune_succeeds(
        1,
        command(data, save=both, valid_data_path=data, test_data_path=data, **own),
        command(data, save=train_only, **{**own, "eval_iters": 0}),
    )
    assert losses(both) == losses(train_only)
    last = read_metrics(both / METRICS_FILE)[-1]
    assert last["validation_loss"] == last["test_loss"]
    ((refused,),) = finetune_runs(1, command(data, **own))
    assert refused.err.startswith("ConfigError: --eval_iters 1 has no validation data to read; give --valid_data_path")


def test_what_a_run_starts_from(data, tmp_path):
    """A resumed run goes on; --no_load_optim goes on with fresh moments; --finetune begins anew with the weights."""
    first, resumed, fresh, tuned = (tmp_path / name for name in ("first", "resumed", "fresh", "tuned"))
    flags = {"train_iters": 5, "save_interval": 3, "lr_decay_iters": 5, "hidden_dropout": 0, "attention_dropout": 0}
    finetune_succeeds(
        1,
        command(data, save=first, **flags),
        command(data, load=first, load_iters=3, save=resumed, **flags),
        command(data, load=first, load_iters=3, no_load_optim=None, save=fresh, **flags),
        command(data, load=first, load_iters=3, finetune=None, save=tuned, **flags),
    )
    assert losses(resumed) == losses(first)[3:]
    assert_same_bits(stored_entries(resumed), stored_entries(first))
    # The first loss shows the loaded weights, the second what the optimizer made of them.
    assert losses(fresh)[0] == losses(first)[3] and losses(fresh)[1] != losses(first)[4]
    assert (state_of(fresh).iteration, state_of(fresh).consumed_samples) == (5, 5 * GLOBAL_BATCH_SIZE)
    assert state_of(fresh).optimizer["num_steps"] == 2
    assert [line["iteration"] for line in read_metrics(tuned / METRICS_FILE)] == [1, 2, 3, 4, 5]
    assert state_of(tuned).consumed_samples == 5 * GLOBAL_BATCH_SIZE
    # The first samples once more, with three steps of training behind them.
    assert losses(tuned)[0] < losses(first)[0]


def test_a_checkpoint_without_the_state_of_this_optimizer_is_refused_before_training(data, tmp_path):
    flags = {"train_iters": 2, "load": tmp_path}
    _, missing, anew, tuned = finetune_runs(
        1,
        command(data, save=tmp_path, no_save_optim=None, train_iters=1),
        command(data, **flags),
        command(data, no_load_optim=None, **flags),
        command(data, finetune=None, **flags),
    )
    assert [ending[0].status for ending in (missing, anew, tuned)] == [2, 0, 0]
    assert missing[0].err.startswith(
        f"CheckpointError: {tmp_path}/iter_0000001 was saved without the optimizer's state"
    )
    assert "--no_load_optim" in missing[0].err and "--finetune" in missing[0].err


def test_the_state_of_another_optimizer_is_refused(data, tmp_path):
    (_, (ending,)) = finetune_runs(
        1,
        command(data, save=tmp_path, train_iters=1),
        command(data, load=tmp_path, train_iters=2, optimizer="sgd"),
    )
    assert ending.status == 2
    assert "holds the state of optimizer adam, and --optimizer is sgd; give that one, or --no_load_optim" in ending.err


def test_a_run_that_saves_where_it_loads_starts_anew_only_while_there_is_nothing(tmp_path):
    folder = tmp_path / "run"
    typed = parse_run(["--load", str(folder), "--save", f"{folder}/"])
    assert finetune.open_load(typed) is None
    folder.mkdir()
    assert finetune.open_load(typed) is None
    (folder / TRACKER_FILE).write_text("7")
    with pytest.raises(CheckpointError, match="iter_0000007/manifest.json does not exist. Restore the files, or start"):
        finetune.open_load(typed)
    (folder / TRACKER_FILE).unlink()
    save_llama(folder)
    assert finetune.open_load(typed) is not None


@pytest.mark.parametrize("pp", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_anything_is_updated_or_saved(data, tmp_path, pp):
    model = save_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_attention_heads_kv", "ffn_hidden_size")
    from_checkpoint = dict.fromkeys((*sizes, "use_rms_norm", "glu_activation", "position_embedding_type"), False)
    argv = command(
        data,
        load=model,
        use_checkpoint_args=None,
        save=tmp_path / "run",
        save_interval=1,
        pipeline_model_parallel_size=pp,
        **{**from_checkpoint, "no_tie_embed_logits": False},
    )
    (endings,) = finetune_runs(2, argv)
    assert [ending.status for ending in endings] == [2, 2]
    assert endings[0].err.splitlines()[-1] == (
        "TrainingError: iteration 1: loss nan, gradient norm nan: not finite, so nothing was updated; resume from the "
        "last checkpoint with a lower --lr or another --seed, or look at the data."
    )
    assert endings[1].err == ""
    assert list_iterations(tmp_path / "run") == []


def test_flags_from_a_file_are_flags_and_the_resolved_ones_beside_the_checkpoints_are_as_well(data, tmp_path):
    typed, written, resolved = (tmp_path / name for name in ("typed", "written", "resolved"))
    flags = {**FLAGS, "data_path": str(data), "train_iters": 2, "save": str(written)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({k: True if v is None else v for k, v in flags.items()}))
    finetune_succeeds(
        1,
        command(data, train_iters=2, save=typed),
        ["--config", str(tmp_path / "run.yaml")],
        ["--config", str(typed / "config.yaml"), "--save", str(resolved)],
    )
    assert losses(typed) == losses(written) == losses(resolved)
    assert_same_bits(stored_entries(written), stored_entries(typed))
    assert_same_bits(stored_entries(resolved), stored_entries(typed))


def run_with_sigterm(argv: list[str], after_samples: int) -> list[Ending]:
    """On a rank; the second one gets the signal when its step after `after_samples` begins."""
    hand_out = StepLoader.__next__

    def next_step(loader: StepLoader):
        if dist.get_rank() == 1 and loader.consumed_samples == after_samples:
            os.kill(os.getpid(), signal.SIGTERM)
        return hand_out(loader)

    StepLoader.__next__ = next_step  # type: ignore[method-assign]
    return run_in_turn([argv])


def test_sigterm_to_one_worker_saves_and_leaves_on_all_and_the_run_goes_on_from_there(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = {"train_iters": 6, "pipeline_model_parallel_size": 2}
    endings = run_distributed(run_with_sigterm, 2, command(data, save=parts, **flags), 3 * GLOBAL_BATCH_SIZE)
    assert [ending.status for (ending,) in endings] == [0, 0]
    assert "SIGTERM at iteration 4: leaving" in endings[0][0].out
    assert list_iterations(parts) == [4]
    finetune_succeeds(2, command(data, save=whole, **flags), command(data, load=parts, save=parts, **flags))
    assert losses(parts) == losses(whole)
    assert_same_bits(stored_entries(parts), stored_entries(whole))


def test_sigterm_to_torchrun_saves_and_leaves(data, tmp_path):
    interrupted, expected = tmp_path / "interrupted", tmp_path / "expected"
    flags = {"train_iters": 5000, "eval_iters": 0}
    metrics = interrupted / METRICS_FILE
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "finetune.py"]
    torchrun = subprocess.Popen(
        [sys.executable, *launcher, *command(data, save=interrupted, **flags)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **_loopback()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            assert torchrun.poll() is None, torchrun.communicate()[0]
            time.sleep(0.02)
        torchrun.send_signal(signal.SIGTERM)
        output, _ = torchrun.communicate(timeout=120)
    finally:
        torchrun.kill()
    (iteration,) = list_iterations(interrupted)
    assert f"SIGTERM at iteration {iteration}: leaving" in output
    finetune_succeeds(2, command(data, save=expected, exit_interval=iteration, **flags))
    assert_same_bits(stored_entries(interrupted), stored_entries(expected))


def _loopback() -> dict[str, str]:
    return {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in (name for _, name in socket.if_nameindex()) else {}
