"""One measured task of `benchmarks.reshard`, in a process of its own: the floor, ours, or the classic way.

python -m benchmarks.reshard_tasks TASK FOLDER RESULT
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.memory import peak_resident_kib
from megatron.checkpoint.conversion import Target, to_megatron
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.placement import regions_of_rank
from megatron.core.layout import ParallelLayout
from megatron.model.config import ModelConfig

NUM_WORKERS: Final = 2
# Under this name lies each input, in the layout or format that the name says: <name> ours, <name>.pt classic.
INPUTS: Final[Mapping[str, str]] = MappingProxyType({"tp1-tp4": "tp1", "tp4-tp2": "tp4", "hf-tp1": "hf"})
LAYOUTS: Final[Mapping[str, ParallelLayout]] = MappingProxyType(
    {"tp1-tp4": ParallelLayout(tp=4), "tp4-tp2": ParallelLayout(tp=2), "hf-tp1": ParallelLayout()}
)
_READ_BYTES = 4 * 2**20


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt"))


def floor(case: str, folder: Path, output: Path) -> None:
    """Every byte of ours is read once, in order, and as many are written to one file and made durable."""
    buffer = memoryview(bytearray(_READ_BYTES))
    num_bytes = 0
    for file in weight_files(folder / INPUTS[case]):
        with open(file, "rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                num_bytes += count
    output.mkdir()
    with open(output / "file", "wb", buffering=0) as opened:
        while num_bytes > 0:
            num_bytes -= opened.write(buffer[: min(num_bytes, _READ_BYTES)])
        os.fsync(opened.fileno())


def ours(case: str, folder: Path, output: Path) -> None:
    """With every byte checked in and out."""
    source = open_source(folder / INPUTS[case])
    to_megatron(source, Target(output, LAYOUTS[case], num_workers=NUM_WORKERS)).write(lambda num_bytes: None)


def classic(case: str, folder: Path, output: Path) -> None:
    """torch.load of everything, cat, split, torch.save, made durable; nothing is checked."""
    if case == "hf-tp1":
        files = weight_files(folder / "hf")
        save_classic([{name: tensor for file in files for name, tensor in load_file(file).items()}], output)
        return
    model = open_source(folder / INPUTS[case]).model_config()
    held_by_rank = [torch.load(file, weights_only=True) for file in weight_files(folder / f"{INPUTS[case]}.pt")]
    save_classic(split_classic(model, _join(model, held_by_rank), LAYOUTS[case]), output)


def split_classic(model: ModelConfig, whole: Mapping[str, Tensor], layout: ParallelLayout) -> list[dict[str, Tensor]]:
    return [
        {r.name: whole[r.name][r.global_slices].clone() for r in regions_of_rank(model, layout, rank)}
        for rank in range(layout.world_size)
    ]


def save_classic(held_by_rank: list[dict[str, Tensor]], output: Path) -> None:
    output.mkdir()
    for rank, held in enumerate(held_by_rank):
        with open(output / f"rank_{rank}.pt", "xb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())


def make_cold(folder: Path) -> None:
    """The next read of these files comes from the disk."""
    for file in weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _join(model: ModelConfig, held_by_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from those of all tensor ranks."""
    layout = ParallelLayout(tp=len(held_by_rank))
    parts: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    for rank, held in enumerate(held_by_rank):
        for region in regions_of_rank(model, layout, rank):
            if region.copy == 0:
                parts.setdefault(region.name, []).append((region.start, held[region.name]))
    return {name: _joined(of_ranks) for name, of_ranks in parts.items()}


def _joined(parts: list[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """The pieces of ranks in order, joined along the dimension in which they begin at different places."""
    if len(parts) == 1:
        return parts[0][1]
    dim = next(d for d in range(parts[0][1].dim()) if parts[0][0][d] != parts[1][0][d])
    return torch.cat([tensor for _, tensor in parts], dim=dim)


TASKS: Final[Mapping[str, Callable[[str, Path, Path], None]]] = MappingProxyType(
    {"floor": floor, "ours": ours, "classic": classic}
)


def main(side: str, case: str, folder: Path, result: Path) -> None:
    torch.set_num_threads(1)
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    make_cold(folder / INPUTS[case])
    if (folder / f"{INPUTS[case]}.pt").exists():
        make_cold(folder / f"{INPUTS[case]}.pt")
    held, before = peak_resident_kib(), resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    TASKS[side](case, folder, output)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    measured = {
        "seconds": seconds,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "user_s": after.ru_utime - before.ru_utime,
        "extra_mib": (peak_resident_kib() - held) / 1024,
        "num_bytes": sum(file.stat().st_size for file in weight_files(folder / INPUTS[case])),
    }
    result.write_text(json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
