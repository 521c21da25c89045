"""The benchmark of saving measures what it says, on the smallest model."""

from pathlib import Path

import torch

from benchmarks.async_save import SavingBenchmark
from benchmarks.workload import SIZES
from megatron.checkpoint.locate import list_iterations
from megatron.checkpoint.opening import open_source


def test_a_round_saves_once_in_the_background_and_once_while_training_waits(tmp_path: Path) -> None:
    bench = SavingBenchmark(SIZES["XS"], torch.device("cpu"), tmp_path)
    times = bench.round(4)
    assert list_iterations(tmp_path) == [9]
    source = open_source(tmp_path)
    stored = sum(torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize for name in source.names())
    assert bench.num_bytes == stored
    assert len(times) == 6 and all(seconds > 0 for seconds in times.values())
