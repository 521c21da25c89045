"""The table of comparisons: who against whom, on how many processes, and how fast ours has to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

from benchmarks.ours import Step, our_step
from benchmarks.peers import (
    distributed_data_parallel,
    dtensor_tensor_parallel,
    hand_written,
    plain_fully_shard,
    torch_pipelining,
)
from benchmarks.workload import Size
from megatron.core.layout import ParallelLayout


@dataclass(frozen=True)
class Comparison:
    """`bar` is the least ratio of our speed to the peer's; below it the result is reported as short.

    One process computes with two threads; several processes with one each.
    """

    ours_name: str
    peer_name: str
    num_processes: int
    bar: float
    ours: Callable[[Size], Step]
    peer: Callable[[Size], Step]


_SERIAL: Final = ParallelLayout()

COMPARISONS: Final[Mapping[str, Comparison]] = MappingProxyType(
    {
        "single": Comparison(
            "one process", "hand-written Llama", 1, 0.97, partial(our_step, layout=_SERIAL), hand_written
        ),
        "compile": Comparison(
            "one process, --compile",
            "one process, eager (ours)",
            1,
            1.1,
            partial(our_step, layout=_SERIAL, compile=True),
            partial(our_step, layout=_SERIAL),
        ),
        "ddp": Comparison(
            "DP 2",
            "DistributedDataParallel",
            2,
            0.97,
            partial(our_step, layout=ParallelLayout(dp=2)),
            distributed_data_parallel,
        ),
        "zero3": Comparison(
            "DP 2, ZeRO-3",
            "fully_shard",
            2,
            0.97,
            partial(our_step, layout=ParallelLayout(dp=2), zero_stage=3),
            plain_fully_shard,
        ),
        "pp": Comparison(
            "PP 2, 1F1B",
            "torch.distributed.pipelining",
            2,
            1.0,
            partial(our_step, layout=ParallelLayout(pp=2)),
            torch_pipelining,
        ),
        "tp": Comparison(
            "TP 2",
            "DTensor tensor parallel",
            2,
            1.3,
            partial(our_step, layout=ParallelLayout(tp=2)),
            dtensor_tensor_parallel,
        ),
    }
)
