"""finetune.sh, multi_node.sh and slurm.sh, run in small: on the CPU, with commands of the cluster played by others."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from finetune_runs import write_tokens
from megatron.config import TypedFlags, parse_run
from megatron.training.sinks import read_metrics
from rank_process import REPOSITORY
from tiny_tokenizers import SENTENCEPIECE_PIECES, write_sentencepiece

EXAMPLES = REPOSITORY / "examples"
SCRIPTS = ("finetune.sh", "multi_node.sh", "slurm.sh")

# Stands for torchrun where only its arguments matter.
RECORD = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD_TO"
"""
# Runs what it is given once for each node, with the number that Slurm gives the node.
SRUN = """#!/usr/bin/env bash
while [[ $1 != bash ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
wait -n && wait -n
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[0-1]" ]] && printf '127.0.0.1\\nnode1\\n'
"""
# ssh HOST COMMAND, where every host is this one.
REMOTE = """#!/usr/bin/env bash
exec bash -c "$2"
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, of the size of a thumb."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SENTENCEPIECE_PIECES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_sentencepiece(folder)
    return folder


@pytest.fixture
def environment(llama: Path, tmp_path: Path) -> dict[str, str]:
    """What turns the scripts' defaults into a run of seconds: two nodes of one process each, or two processes."""
    variables = {
        "LOAD": llama,
        "DATA": write_tokens(tmp_path / "counting"),
        "SAVE": tmp_path / "run with a space",
        "SEQ_LENGTH": 16,
        "TP": 1,
        "PP": 2,
        "TRAIN_ITERS": 2,
        "MICRO_BATCH": 1,
        "GLOBAL_BATCH": 4,
        "EVAL_ITERS": 0,
        "OMP_NUM_THREADS": 1,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "bin").mkdir()
    return {**os.environ, **{name: str(value) for name, value in variables.items()}, "PATH": path}


def command(folder: Path, name: str, text: str) -> Path:
    file = folder / "bin" / name
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def run(script: str, environment: dict[str, str], *flags: str, **variables: object) -> str:
    """Both streams of a script that has to succeed. SIGTERM, where it takes too long, is passed on by torchrun."""
    process = subprocess.Popen(
        ["bash", str(EXAMPLES / script), *flags],
        env={**environment, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def typed_by(tmp_path: Path, environment: dict[str, str], *flags: str, **variables: object) -> tuple[str, TypedFlags]:
    """torchrun's own arguments, and those of finetune.py as it reads them."""
    command(tmp_path, "torchrun", RECORD)
    run("finetune.sh", environment, *flags, RECORD_TO=tmp_path / "typed", **variables)
    arguments = (tmp_path / "typed").read_text().splitlines()
    script = arguments.index("finetune.py")
    return " ".join(arguments[:script]), parse_run(arguments[script + 1 :])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / script)], check=True)


def test_finetune_trains_and_then_continues(environment: dict[str, str]) -> None:
    save = Path(environment["SAVE"])
    assert "TP1 x PP2 x DP1" in run(
        "finetune.sh", environment, "--exit_interval", "1", GPUS_PER_NODE=2, MASTER_PORT=free_port()
    )
    output = run("finetune.sh", environment, GPUS_PER_NODE=2, MASTER_PORT=free_port())
    assert f"--load '{save}'" in output  # as the script shows the command
    assert [line["iteration"] for line in read_metrics(save / "metrics.jsonl")] == [1, 2]


def test_multi_node_runs_every_host(environment: dict[str, str], tmp_path: Path) -> None:
    remote = command(tmp_path, "remote", REMOTE)
    hosts = {"HOSTS": "127.0.0.1 127.0.0.1", "REMOTE": remote, "GPUS_PER_NODE": 1, "MASTER_PORT": free_port()}
    assert "TP1 x PP2 x DP1" in run("multi_node.sh", environment, "--lr", "1e-4", "--lr_decay_style=constant", **hosts)
    metrics = read_metrics(Path(environment["SAVE"]) / "metrics.jsonl")
    assert metrics[0]["learning_rate"] == 1e-4 and len(metrics) == 2


@pytest.mark.parametrize("ending", ["SIGINT to the script", "SIGTERM to the script", "its death"])
def test_what_ends_multi_node_lets_every_host_save_and_leave(tmp_path: Path, ending: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "finetune.sh").write_text(
        "trap 'echo rank $NODE_RANK saved > $SAVE/$NODE_RANK; exit 3' TERM\n"
        "echo started\nfor i in {1..600}; do sleep 0.1; done\n"
    )
    hosts = {"HOSTS": "node0 node1", "REPOSITORY": str(tmp_path), "SAVE": str(tmp_path)}
    script = subprocess.Popen(
        ["bash", str(EXAMPLES / "multi_node.sh")],
        env={**os.environ, **hosts, "REMOTE": command(tmp_path, "remote", REMOTE)},
        stdout=subprocess.PIPE,
        text=True,
        # As from a terminal: a shell cannot trap a signal that was ignored when it started, as it is in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert [script.stdout.readline() for _ in range(2)] == ["started\n"] * 2
    script.send_signal({"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}.get(ending.split()[0], signal.SIGKILL))
    assert script.stdout.read() == ""  # the far ends have ended
    assert script.wait() == (-signal.SIGKILL if ending == "its death" else 3)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["rank 0 saved\n", "rank 1 saved\n"]


def test_slurm_runs_every_node(environment: dict[str, str], tmp_path: Path) -> None:
    command(tmp_path, "srun", SRUN)
    command(tmp_path, "scontrol", SCONTROL)
    job = {
        "SLURM_SUBMIT_DIR": REPOSITORY,
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_JOB_ID": 9513,
        "SLURM_GPUS_ON_NODE": 1,
    }
    output = run("slurm.sh", environment, **job)
    assert "TP1 x PP2 x DP1" in output
    assert "--master_addr 127.0.0.1 --master_port 29513" in output
    assert len(read_metrics(Path(environment["SAVE"]) / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("size", "layout", "lr"),
    [("7", (2, 1), 3e-4), ("13", (4, 1), 3e-4), ("34", (8, 1), 1.5e-4), ("70", (8, 4), 1.5e-4)],
)
def test_layout_and_learning_rate_follow_the_size(
    environment: dict[str, str], tmp_path: Path, size: str, layout: tuple[int, int], lr: float
) -> None:
    del environment["TP"], environment["PP"]
    launch, typed = typed_by(tmp_path, environment, SIZE=size, NNODES=4, NODE_RANK=3, MASTER_ADDR="node0")
    assert launch == "--nproc_per_node 8 --nnodes 4 --node_rank 3 --master_addr node0 --master_port 29500"
    parallel = typed.section("parallel")
    assert (parallel["tensor_model_parallel_size"], parallel["pipeline_model_parallel_size"]) == layout
    assert typed.section("optimizer")["lr"] == lr


def test_what_follows_the_name_wins(environment: dict[str, str], tmp_path: Path) -> None:
    _, typed = typed_by(tmp_path, environment, "--lr", "1e-5", "--zero_stage=3", "--compile")
    assert typed.section("optimizer")["lr"] == 1e-5
    assert typed.section("parallel")["zero_stage"] == 3
    assert typed.section("training")["compile"] is True


def test_without_weights_a_published_size_starts_from_random_ones(environment: dict[str, str], tmp_path: Path) -> None:
    _, typed = typed_by(tmp_path, environment, LOAD="", MODEL="llama3", SIZE="8", TOKENIZER="tokenizer.json")
    assert typed.section("training")["size"] == "8" and typed.section("training")["model_name"] == "llama3"
    assert typed.section("tokenizer") == {"tokenizer_model": "tokenizer.json"}
    assert "load" not in typed.section("checkpoint")


@pytest.mark.parametrize(("script", "name"), [("finetune.sh", "DATA"), ("multi_node.sh", "HOSTS")])
def test_a_missing_variable_is_named(environment: dict[str, str], script: str, name: str) -> None:
    environment.pop(name, None)
    ended = subprocess.run(["bash", str(EXAMPLES / script)], env=environment, capture_output=True, text=True)
    assert ended.returncode != 0
    assert f"{name}: name the " in ended.stderr and f"{name}=" in ended.stderr


def test_the_guide_types_what_torchrun_and_the_scripts_take(environment: dict[str, str], tmp_path: Path) -> None:
    guide = (REPOSITORY / "docs" / "guide" / "multi_node.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", guide, re.DOTALL) for line in block.splitlines()]
    launches = [shlex.split(line) for line in lines if line.startswith("torchrun")]
    assert len(launches) == 3
    for launch in launches:
        parsed = get_args_parser().parse_args(launch[1:])
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.training_script) == ("2", "8", "finetune.py")
    scripts = [line for line in lines if "examples/" in line]
    assert len(scripts) == 2
    known = set(re.findall(r"^(\w+)=\$\{", "".join((EXAMPLES / name).read_text() for name in SCRIPTS), re.MULTILINE))
    known |= set(re.findall(r" (TP|PP)=\$\{", (EXAMPLES / "finetune.sh").read_text()))
    for line in scripts:
        assert set(re.findall(r"\b([A-Z]\w*)=", line)) <= known, line


def test_multi_node_passes_on_every_variable_of_finetune() -> None:
    finetune, multi_node = ((EXAMPLES / name).read_text() for name in ("finetune.sh", "multi_node.sh"))
    variables = set(re.findall(r"\b([A-Z_]+)=\$\{\1:", finetune))
    assert {"MODEL", "TP", "PP", "LR", "WARMUP"} <= variables
    (passed,) = re.findall(r"for name in (.*?); do", multi_node, re.DOTALL)
    assert variables - {"NODE_RANK"} <= set(passed.replace("\\\n", " ").split())
