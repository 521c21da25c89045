"""Resharding and importing a large model: our time against the floor of the disk, beside load, cat, split and save.

python -m benchmarks.reshard [--gib 2] [--rounds 3] [--folder DIR]

The floor is a sequential cold read of the same bytes and a durable write of as many, measured in the same round. Each
measurement is a process of its own, which begins with files that are not in the page cache; the order of the three
sides changes from round to round. What ours writes is compared with its input, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.reshard_tasks import INPUTS, LAYOUTS, TASKS, save_classic, split_classic
from benchmarks.worker import hardware_name
from megatron.checkpoint.conversion import Target, to_hugging_face, to_megatron
from megatron.checkpoint.diff import compare
from megatron.checkpoint.manager import save
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.placement import logical_shapes, regions_of_rank
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, RunState
from megatron.core.layout import ParallelLayout
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig

RESULT: Final = Path(__file__).parent / "results" / "reshard.md"
MAX_TIMES_THE_FLOOR: Final = 2.0
MAX_EXTRA_MIB: Final = 200
_DRAWN_ELEMENTS = 2**24


def model_of(gib: float) -> ModelConfig:
    """A Llama of about so many GiB in bfloat16: layers of 2048 features (97 MiB each) beside a vocabulary of 32,000."""
    embedding_and_head, layer = 2 * 32000 * 2048 * 2, (4 * 2048**2 + 3 * 2048 * 5504) * 2
    return ModelConfig(
        num_layers=max(1, round((gib * 2**30 - embedding_and_head) / layer)),
        hidden_size=2048,
        num_attention_heads=16,
        num_attention_heads_kv=16,
        ffn_hidden_size=5504,
        vocab_size=32000,
        max_position_embeddings=2048,
        use_rms_norm=True,
        glu_activation="swiglu",
        position_embedding_type="rotary",
        tie_embed_logits=False,
    )


def measure_all(gib: float = 2.0, num_rounds: int = 3, parent: str | None = None) -> None:
    """Measures every case, prints the table and writes it to the results. `parent` holds the files meanwhile."""
    with tempfile.TemporaryDirectory(prefix="reshard-", dir=parent) as folder:
        make_inputs(model_of(gib), Path(folder))
        rounds = {case: measure(case, Path(folder), num_rounds) for case in INPUTS}
    text = report(rounds, gib)
    print(text)
    RESULT.write_text(text)


def make_inputs(model: ModelConfig, folder: Path) -> None:
    """The same weights as one file, as four, and as a Hugging Face model; each layout also in torch.save's files."""
    drawn = torch.randn(_DRAWN_ELEMENTS, generator=torch.Generator().manual_seed(0)).bfloat16()
    shapes = logical_shapes(model)
    whole = {name: _repeated(drawn, shape, number) for number, (name, shape) in enumerate(shapes.items())}
    regions = [replace(region, local_start=region.start) for region in regions_of_rank(model, ParallelLayout(), 0)]
    held = [LocalTensor("model", [region], whole[region.name]) for region in regions]
    save(folder / "tp1", CheckpointInfo(RunState(iteration=1), model, "llama2"), held, Axis("world"))
    for case, layout in (("tp1", ParallelLayout()), ("tp4", ParallelLayout(tp=4))):
        save_classic(split_classic(model, whole, layout), folder / f"{case}.pt")
    source = open_source(folder / "tp1")
    to_megatron(source, Target(folder / "tp4", ParallelLayout(tp=4))).write(lambda num_bytes: None)
    to_hugging_face(source, Target(folder / "hf", ParallelLayout())).write(lambda num_bytes: None)


def measure(case: str, folder: Path, num_rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each side took in each round, after one that is not counted."""
    sides = list(TASKS)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(-1, num_rounds):
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            measured = _in_a_process(side, case, folder)
            if side == "ours":
                _check_output(case, folder)
            if number >= 0:
                found[side].append(measured)
    shutil.rmtree(folder / "output", ignore_errors=True)
    return found


def report(rounds: dict[str, dict[str, list[dict[str, float]]]], gib: float) -> str:
    lines = [
        f"# Resharding {gib:g} GiB",
        "",
        f"{hardware_name()}, torch {torch.__version__}; load {os.getloadavg()[0]:.1f} at the end. Medians of "
        f"{len(next(iter(rounds.values()))['ours'])} rounds; floor: cold sequential read and durable write of the same "
        "bytes. Ours checks every byte it reads and writes; classic is torch.load, cat, split and torch.save. "
        "Times the floor is the median of the rounds' own ratios, with least and largest; memory is the largest.",
        "",
        f"| case | floor s | ours s | times the floor (at most {MAX_TIMES_THE_FLOOR:g}) | "
        f"ours extra MiB (at most {MAX_EXTRA_MIB}) | ours CPU s, user s | classic s | classic extra MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, sides in rounds.items():
        times = [mine["seconds"] / least["seconds"] for mine, least in zip(sides["ours"], sides["floor"], strict=True)]
        ratio, extra = statistics.median(times), max(mine["extra_mib"] for mine in sides["ours"])
        met = "met" if ratio <= MAX_TIMES_THE_FLOOR and extra <= MAX_EXTRA_MIB else "**short**"
        cells = (
            case,
            f"{_median(sides['floor'], 'seconds'):.2f}",
            f"{_median(sides['ours'], 'seconds'):.2f}",
            f"{ratio:.2f} ({min(times):.2f} to {max(times):.2f}), {met}",
            f"{extra:.0f}",
            f"{_median(sides['ours'], 'cpu_s'):.1f}, {_median(sides['ours'], 'user_s'):.1f}",
            f"{_median(sides['classic'], 'seconds'):.2f}",
            f"{max(theirs['extra_mib'] for theirs in sides['classic']):.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _median(measured: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] for one in measured)


def _in_a_process(side: str, case: str, folder: Path) -> dict[str, float]:
    result = folder / "result.json"
    command = [sys.executable, "-m", "benchmarks.reshard_tasks", side, case, str(folder), str(result)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    measured: dict[str, Any] = json.loads(result.read_text())
    print(f"{case} {side:8s} {measured['seconds']:6.2f} s  CPU {measured['cpu_s']:5.2f} s", flush=True)
    return measured


def _check_output(case: str, folder: Path) -> None:
    source, written = open_source(folder / INPUTS[case]), open_source(folder / "output")
    difference = compare(source, written, weights_only=True, num_workers=2, on_bytes=lambda num_bytes: None)
    assert difference.is_empty, difference
    assert len(list(written.path.glob("*.safetensors"))) == LAYOUTS[case].world_size


def _repeated(drawn: Tensor, shape: tuple[int, ...], number: int) -> Tensor:
    """Different values for every tensor without drawing so many."""
    num_elements = torch.Size(shape).numel()
    copies = -(-(num_elements + number) // len(drawn))
    return drawn.repeat(copies)[number : number + num_elements].reshape(shape)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reshard", description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every side (default: %(default)s)")
    parser.add_argument("--folder", help="where the files lie, seven times the size (default: the system's)")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _parse()
    measure_all(arguments.gib, arguments.rounds, arguments.folder)
