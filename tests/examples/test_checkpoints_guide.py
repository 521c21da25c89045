"""docs/guide/checkpoints.md: every command runs on a small model and prints what the guide shows."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import zlib
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.manager import save
from megatron.checkpoint.placement import logical_shapes, regions_of_rank
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, RunState
from megatron.config import parse_run, resolve
from megatron.core.layout import ParallelLayout
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "docs" / "guide" / "checkpoints.md"
TOOL = "tools/checkpoint_util.py"
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=64,
    num_attention_heads=8,
    num_attention_heads_kv=2,
    ffn_hidden_size=160,
    vocab_size=16000,
    max_position_embeddings=256,
    layernorm_epsilon=1e-5,
    use_rms_norm=True,
    glu_activation="swiglu",
    position_embedding_type="rotary",
    tie_embed_logits=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


def blocks(text: str) -> list[tuple[str, str]]:
    """Each command of the guide, in order, and the output that follows it, empty where none does."""
    found = re.findall(r"```bash\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)
    return [(command.replace("\\\n", " "), shown) for command, shown in found]


def write_run(root: Path) -> None:
    """Two iterations of a run, as one process saves them."""
    for iteration in (100, 200):
        tensors = []
        for region in regions_of_rank(MODEL, ParallelLayout(), 0):
            for kind in KINDS:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}.{region.name} {iteration}".encode()))
                alone = dataclasses.replace(region, local_start=region.start)
                tensors.append(LocalTensor(kind, [alone], torch.randn(region.size, generator=generator)))
        state = RunState(
            iteration=iteration,
            consumed_samples=iteration * 16,
            seed=1234,
            optimizer={"num_steps": iteration},
            scheduler={"num_steps": iteration},
            data={"train": 8000},
        )
        save(root, CheckpointInfo(state, MODEL, "llama2"), tensors, Axis("world"))


def run_tool(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    spec = importlib.util.spec_from_file_location("checkpoint_util", REPOSITORY / TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    status = 0
    try:
        module.main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    return status, capsys.readouterr().out


def comparable(line: str) -> str:
    """Without what differs from machine to machine: times, free space, and how wide a column is."""
    line = re.sub(r"in [\d.]+ s \([\d.]+ \w+/s\)", "in TIME", line)
    return re.sub(r"\s+", " ", re.sub(r"\S+ has [\d,]+ bytes free", "FREE", line)).strip()


def damage(words: list[str]) -> None:
    """printf 'X' | dd of=FILE bs=1 seek=N conv=notrunc"""
    options = dict(word.partition("=")[::2] for word in words[words.index("dd") + 1 :])
    with open(options["of"], "r+b") as file:
        file.seek(int(options["seek"]))
        file.write(words[1].encode())


def test_every_command_prints_what_the_guide_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    write_run(Path("run"))
    num_run = 0
    for command, shown in blocks(GUIDE.read_text()):
        words = shlex.split(command, comments=True)
        if words[0] == "printf":
            damage(words)
        elif words[0] == "torchrun":
            run = resolve(parse_run(words[words.index("finetune.py") + 1 :]), 4, tokenizer_vocab_size=MODEL.vocab_size)
            assert logical_shapes(run.model) == logical_shapes(MODEL)
        else:
            assert words[:2] == ["python", TOOL], command
            _, printed = run_tool(words[2:], capsys)
            actual = [comparable(line) for line in printed.splitlines()]
            for line in shown.splitlines():
                assert line.strip() == "..." or comparable(line) in actual, f"{command}\n{printed}"
            num_run += 1
    assert num_run >= 8


def test_every_link_of_the_guide_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", GUIDE.read_text())
    assert [link for link in links if not (GUIDE.parent / link).exists()] == []
