"""Bad input ends every process with one line that says what is wrong, and no process waits for another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from distributed import run_distributed, run_torchrun
from finetune_runs import Ending, command, finetune_runs, finetune_succeeds, run_command, run_in_turn, write_tokens
from megatron.optimizer.optimizers import Optimizer

# World size, the flags that are wrong, and how the message begins and what else it says. {} is the folder of samples.
BAD: Mapping[str, tuple[int, Mapping[str, object], tuple[str, ...]]] = {
    "heads": (
        8,
        {"tensor_model_parallel_size": 8},
        ("ConfigError: --num_attention_heads 4 cannot be split over --tensor_model_parallel_size 8", "use a divisor"),
    ),
    "ffn": (
        4,
        {"tensor_model_parallel_size": 4, "ffn_hidden_size": 50},
        ("ConfigError: --ffn_hidden_size 50 cannot be split over --tensor_model_parallel_size 4", "use a divisor"),
    ),
    "layers": (
        5,
        {"pipeline_model_parallel_size": 5},
        ("ConfigError: --num_layers 4 cannot fill 5 pipeline stages", "--pipeline_model_parallel_size"),
    ),
    "world size": (
        6,
        {"tensor_model_parallel_size": 4},
        (
            "ConfigError: 6 processes cannot be divided into groups of 4 (--tensor_model_parallel_size 4 x "
            "--pipeline_model_parallel_size 1)",
            "start a multiple of 4",
        ),
    ),
    "global batch": (
        4,
        {"global_batch_size": 6},
        ("ConfigError: --global_batch_size 6 is not a multiple of 4", "4 data-parallel ranks", "use 4 or 8"),
    ),
    "unknown flag": (
        4,
        {"micro_batchsize": 2},
        ("ConfigError: --micro_batchsize is not a flag of this program; did you mean --micro_batch_size?",),
    ),
    "typo of the FAQ": (
        4,
        {"lr_decay_style": "cosine 5"},
        ("ConfigError: '5' after '--lr_decay_style cosine' belongs to no flag", "remove '5'"),
    ),
    "flag of torchrun": (
        4,
        {"n_proc_per_node": 4},
        ("ConfigError: --n_proc_per_node is an option of torchrun", "before the script's name"),
    ),
    "interleaved layers": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
        ("ConfigError: --num_layers 4 cannot be dealt out to 2 pipeline ranks", "1f1b"),
    ),
    "interleaved micro-batches": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 1,
            "global_batch_size": 3,
        },
        ("ConfigError: --global_batch_size 3 gives 3 micro-batches", "use a multiple of 2"),
    ),
    "interleaved without pipeline": (
        2,
        {"num_layers_per_virtual_pipeline_stage": 1},
        ("ConfigError: --pipeline_model_parallel_size 1 has nothing to interleave", "drop"),
    ),
    "sequence parallel": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": None, "seq_length": 15},
        ("ConfigError: --seq_length 15 cannot be cut into 2 equal parts", "use a multiple of 2"),
    ),
    "vocabulary": (
        4,
        {"vocab_size": 60},
        ("DataError: {}/tokens.bin: token id 60 at position ", "outside the vocabulary of 60"),
    ),
    "missing data": (
        4,
        {"data_path": "{}/nowhere"},
        ("DataError: {}/nowhere: there is no tokenized dataset of this name", "tools/preprocess_data.py"),
    ),
    "missing .idx": (
        4,
        {"data_path": "{}/no_index"},
        ("DataError: {}/no_index.idx",),
    ),
    "truncated .bin": (
        4,
        {"data_path": "{}/short"},
        ("DataError: {}/short.bin", "bytes"),
    ),
    "no validation data": (
        4,
        {"split": "1"},
        ("DataError: {}/tokens: --split '1' of 60 documents leaves none for valid", "--eval_iters 0"),
    ),
    "nothing to load": (
        4,
        {"load": "{}/nowhere"},
        ("CheckpointError: {}/nowhere does not exist", "give the folder of a checkpoint"),
    ),
    "another architecture": (
        4,
        {"load": "{}/run", "num_layers": 3, "hidden_size": 48, "use_rms_norm": False},
        (
            "CheckpointError: {}/run/iter_0000001 holds another architecture: num_layers is 4 in the checkpoint and 3 "
            "in the run; hidden_size is 32 in the checkpoint and 48 in the run",
            "use_rms_norm is True in the checkpoint and False in the run",
            "--use_checkpoint_args",
        ),
    ),
    "another architecture than typed": (
        4,
        {"load": "{}/run", "use_checkpoint_args": None, "num_layers": 3},
        ("ConfigError: --num_layers 3 (checkpoint: 4): typed values differ", "leave them out"),
    ),
    "nothing in the checkpoint for these ids": (
        4,
        {"load": "{}/run", "vocab_size": 70},
        ("TokenizerError: NullTokenizer has ids up to 69, but the checkpoint has 61 embedding rows", "checkpoint_util"),
    ),
    "damaged manifest": (
        4,
        {"load": "{}/damaged_manifest"},
        (
            "CheckpointError: {}/damaged_manifest holds no checkpoint that can be loaded",
            "{}/damaged_manifest/iter_0000001/manifest.json is damaged",
        ),
    ),
    "unwritable folder": (
        4,
        {"save": "{}/file/run"},
        ("CheckpointError: no checkpoint can be written to {}/file/run (Not a directory)", "choose another folder"),
    ),
    "no GPU": (
        4,
        {"device": "cuda"},
        ("ConfigError: --device cuda: this PyTorch finds no GPU", "--device cpu"),
    ),
    "bad file of flags": (
        4,
        {"config": "{}/bad.yaml"},
        ("ConfigError: {}/bad.yaml: num_layer is not a flag of this program; did you mean num_layers?",),
    ),
    "no tokenizer": (
        4,
        {"tokenizer_type": False, "vocab_size": False},
        ("ConfigError: no tokenizer is given", "--tokenizer_model"),
    ),
    "float16": (
        4,
        {"fp16": None},
        ("ConfigError: --fp16 belongs to float16 training", "use --bf16"),
    ),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and checkpoints, whole and damaged."""
    folder = tmp_path_factory.mktemp("samples")
    data = write_tokens(folder / "tokens")
    shutil.copy(f"{data}.bin", folder / "no_index.bin")
    shutil.copy(f"{data}.idx", folder / "short.idx")
    (folder / "short.bin").write_bytes(Path(f"{data}.bin").read_bytes()[:-7])
    (folder / "file").touch()
    (folder / "bad.yaml").write_text("num_layer: 4\n")
    pipeline = {"pipeline_model_parallel_size": 2}
    finetune_succeeds(2, command(data, save=folder / "run", train_iters=1, eval_iters=0, **pipeline))
    for damaged in ("damaged_manifest", "damaged_shard"):
        shutil.copytree(folder / "run", folder / damaged)
    flip_byte(folder / "damaged_manifest" / "iter_0000001" / "manifest.json")
    flip_byte(folder / "damaged_shard" / "iter_0000001" / "rank_00001.safetensors")
    return folder


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def start_alone(commands: Sequence[tuple[int, Sequence[str]]]) -> list[Ending]:
    """On one rank of several whose peers never come: whatever asked for them would fail."""
    dist.destroy_process_group()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process group was started")

    dist.init_process_group = refuse
    endings = []
    for world_size, argv in commands:
        for local_rank in (0, 1):
            os.environ.update(RANK=str(local_rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
            endings.append(run_command(argv))
    return endings


@pytest.fixture(scope="module")
def endings(samples: Path) -> dict[str, tuple[Ending, Ending]]:
    """How local ranks 0 and 1 end with each bad input."""
    commands = []
    for world_size, flags, _ in BAD.values():
        filled = {name: value.format(samples) if isinstance(value, str) else value for name, value in flags.items()}
        argv = command(samples / "tokens", **{"train_iters": 2, "data_path": samples / "tokens", **filled})
        commands.append((world_size, [word for token in argv for word in split_typo(token)]))
    (flat,) = run_distributed(start_alone, 1, commands, timeout_s=120)
    return dict(zip(BAD, zip(flat[::2], flat[1::2], strict=True), strict=True))


def split_typo(token: str) -> list[str]:
    return token.split() if token == "cosine 5" else [token]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_from_one_process_before_any_of_them_communicates(name, endings, samples):
    first, second = endings[name]
    assert (first.status, second.status) == (2, 2), first.err + second.err
    beginning, *others = (text.format(samples) for text in BAD[name][2])
    assert first.err.startswith(beginning), first.err
    assert all(other in first.err for other in others), first.err
    assert (first.out, first.err.count("\n"), second.out, second.err) == ("", 1, "", "")


@pytest.mark.parametrize("layout", [{"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}], ids=str)
def test_damage_that_some_ranks_find_stops_all_of_them(layout, samples):
    argv = command(samples / "tokens", load=samples / "damaged_shard", train_iters=2, eval_iters=0, **layout)
    ((first, second),) = finetune_runs(2, argv)
    assert (first.status, second.status) == (2, 2)
    file = samples / "damaged_shard" / "iter_0000001" / "rank_00001.safetensors"
    assert f"{file}: the tile at rows 0 to" in first.err and " of optimizer.exp_avg_sq.layers." in first.err
    assert first.err.splitlines()[-1].startswith("CheckpointError: ") and second.err == ""


def test_under_torchrun_the_line_is_printed_once_and_the_status_is_not_0(samples):
    argv = command(
        samples / "tokens",
        load=samples / "damaged_shard",
        train_iters=2,
        eval_iters=0,
        pipeline_model_parallel_size=2,
    )
    run = run_torchrun(["finetune.py", *argv], nproc=2)
    assert run.returncode != 0
    assert run.stdout.count("CheckpointError: ") == 1
    assert 'finetune.py", line' not in run.stdout, "a traceback of ours"
    assert "exitcode  : 2" in run.stdout


def test_a_save_folder_that_vanishes_under_a_run_is_an_error_of_all_ranks(samples, tmp_path):
    """What only turns up when a checkpoint is written."""
    argv = command(samples / "tokens", save=tmp_path / "run", train_iters=1, eval_iters=0)
    (first,), (second,) = run_distributed(lose_the_folder, 2, argv, tmp_path / "run")
    assert (first.status, second.status) == (2, 2)
    assert first.err.startswith(f"CheckpointError: rank 0: no checkpoint can be written to {tmp_path / 'run'}")
    assert second.err == ""


def lose_the_folder(argv: Sequence[str], save: Path) -> list[Ending]:
    """On a rank: the folder becomes a file while the run trains."""
    update = Optimizer.step

    def step(optimizer: Optimizer, lr: float) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(save)
            save.touch()
        update(optimizer, lr)

    Optimizer.step = step  # type: ignore[method-assign]
    return run_in_turn([argv])
