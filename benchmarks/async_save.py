"""What a checkpoint costs the training: the step that saves, against a plain step and the bare copy.

python -m benchmarks.async_save [--size M] [--rounds 10] [--device cuda] [--folder DIR]

In every round: a plain step, the copy of the state alone, a step that saves in the background, the steps taken until
that checkpoint is on the disk, and a step that saves while training waits. Give a folder on the disk that is meant.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import torch

from benchmarks.ours import our_batches
from benchmarks.worker import hardware_name
from benchmarks.workload import ADAM, SEED, SIZES, Size
from megatron.checkpoint.manager import save
from megatron.checkpoint.retention import Retention
from megatron.checkpoint.snapshot import HostBuffers, snapshot_bytes
from megatron.checkpoint.source import MODEL, CheckpointInfo, LocalTensor, RunState
from megatron.core.data_parallel import DataParallelConfig
from megatron.core.topology import Topology
from megatron.model.init import initial_value
from megatron.model.stage import StageOptions
from megatron.optimizer.optimizers import Optimizer
from megatron.training.build import build_parts, fill_weights
from megatron.training.forward import Pipeline
from megatron.training.saving import Saver
from megatron.training.step import TrainStep

BAR: Final = 1.5
WARM_UP: Final = 2


def main() -> None:
    arguments = _parse()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        bench = SavingBenchmark(SIZES[arguments.size], torch.device(arguments.device), Path(root))
        rounds = [bench.round(number) for number in range(WARM_UP + arguments.rounds)][WARM_UP:]
    times = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    size_gb, allowed = bench.num_bytes / 1e9, BAR * times["plain step"] + times["copy alone"]
    device_name = torch.cuda.get_device_name() if arguments.device == "cuda" else hardware_name()
    print(f"{device_name}; size {arguments.size}, {size_gb:.3f} GB a checkpoint, medians of {len(rounds)} rounds")
    for name, seconds in times.items():
        print(f"  {name:48} {seconds * 1e3:9.1f} ms")
    print(f"  {f'allowed: {BAR:g} plain steps and the copy':48} {allowed * 1e3:9.1f} ms")
    slower = max(times["step that saves in the background"], times["the step after it, while it is written"])
    print("holds" if slower <= allowed else "DOES NOT HOLD")


class SavingBenchmark:
    """One process that trains and saves."""

    def __init__(self, size: Size, device: torch.device, root: Path):
        topology = Topology.serial(device)
        parts = build_parts(size.model, topology, StageOptions(size.model.vocab_size), DataParallelConfig())
        fill_weights(parts.data_parallel, topology, lambda region: initial_value(size.model, SEED, region))
        pipeline = Pipeline(parts, topology, schedule="1f1b", compute_dtype=torch.float32, sequence_parallel=False)
        optimizer = Optimizer(ADAM, parts.data_parallel.shards)
        self._train = TrainStep(pipeline, optimizer, topology, clip_grad=ADAM.clip_grad, seed=SEED)
        self._batches = [batch.to(device) for batch in our_batches(size)]
        self._model, self._device = size.model, device
        self._tensors = [
            LocalTensor(kind, shard.regions(topology.tp), tensor)
            for shard in parts.data_parallel.shards
            for kind, tensor in [
                (MODEL, shard.tensor.detach()),
                *((f"optimizer.{name}", state) for name, state in optimizer.state[shard.name].items()),
            ]
        ]
        self.num_bytes = snapshot_bytes(self._tensors)
        write = partial(_write, root, topology)
        self._spare = HostBuffers(self._tensors)
        self._background = Saver(write, HostBuffers(self._tensors))
        self._waiting = Saver(write)

    def round(self, number: int) -> dict[str, float]:
        """Seconds of each measurement."""
        times = {
            "plain step": self._timed(self._step),
            "copy alone": self._timed(lambda: self._spare.copy(self._tensors)),
            "step that saves in the background": self._timed(lambda: self._save(self._background, 2 * number)),
        }
        during = [self._timed(self._step)]
        while self._background.finished() is None:
            during.append(self._timed(self._step))
        times["the step after it, while it is written"] = during[0]
        times["mean step until it is written"] = statistics.mean(during)
        times["step that saves while training waits"] = self._timed(lambda: self._save(self._waiting, 2 * number + 1))
        return times

    def _step(self) -> None:
        self._train.run(self._batches, 1, ADAM.lr)

    def _save(self, saver: Saver, iteration: int) -> None:
        self._step()
        saver.save(CheckpointInfo(RunState(iteration), self._model), self._tensors)

    def _timed(self, action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _write(root: Path, topology: Topology, info: CheckpointInfo, tensors: list[LocalTensor]) -> Path:
    return save(root, info, tensors, topology.world, retention=Retention(1))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.async_save", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="M")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", metavar="DIR", help="where checkpoints are written and removed again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
