"""One comparison at one size, in the processes that were started for it; the first writes the result as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.comparisons import COMPARISONS, Comparison
from benchmarks.ours import Step
from benchmarks.pairs import LOSS_TOLERANCE, Ratio, losses_differ_by, measure_pairs, ratio_of
from benchmarks.workload import SIZES, Size

NUM_PROFILED_OPERATIONS = 14


@dataclass(frozen=True)
class Result:
    """One row of the table. `profiles` (ours, peer) is there when the ratio is short of its bar.

    `cpu_ratio` compares the CPU time of the last process, which says more than seconds where the machine is busy.
    """

    name: str
    size: str
    ours: str
    peer: str
    ratio: Ratio
    cpu_ratio: Ratio
    bar: float
    num_pairs: int
    ours_step_s: float
    peer_step_s: float
    ours_tokens_per_s: float
    ours_gflops: float
    loss_difference: float
    hardware: str
    torch_version: str
    load_before: float
    date: str
    profiles: tuple[str, str] | None = None

    @property
    def is_short(self) -> bool:
        return self.ratio.median < self.bar


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=COMPARISONS)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("num_pairs", type=int)
    parser.add_argument("load_before", type=float)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # of torch's own parts about each other; ours are for tests to see
    comparison, size = COMPARISONS[arguments.name], SIZES[arguments.size]
    torch.set_num_threads(threads_per_process(comparison))
    result = compare(arguments.name, comparison, size, arguments.num_pairs, arguments.load_before)
    if result is not None:
        arguments.output.write_text(json.dumps(asdict(result), indent=1) + "\n")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def threads_per_process(comparison: Comparison) -> int:
    return 2 if comparison.num_processes == 1 else 1


def compare(name: str, comparison: Comparison, size: Size, num_pairs: int, load_before: float) -> Result | None:
    """The result on the last process, which knows the losses of every layout; None on the others."""
    ours, peer = comparison.ours(size), comparison.peer(size)
    ours_side, peer_side = measure_pairs(ours, peer, num_pairs)
    ratio = _agreed(ratio_of(ours_side.step_s, peer_side.step_s), comparison.num_processes)
    profiles = (top_operations(ours), top_operations(peer)) if ratio.median < comparison.bar else None
    if comparison.num_processes > 1 and dist.get_rank() < dist.get_world_size() - 1:
        return None
    difference = losses_differ_by(ours_side, peer_side)
    if difference > LOSS_TOLERANCE:
        raise SystemExit(f"the losses differ by {difference:.1e}: the sides did not do the same work")
    ours_step_s = statistics.median(ours_side.step_s)
    return Result(
        name=name,
        size=size.name,
        ours=comparison.ours_name,
        peer=comparison.peer_name,
        ratio=ratio,
        cpu_ratio=ratio_of(ours_side.cpu_s, peer_side.cpu_s),
        bar=comparison.bar,
        num_pairs=num_pairs,
        ours_step_s=ours_step_s,
        peer_step_s=statistics.median(peer_side.step_s),
        ours_tokens_per_s=size.tokens_per_step / ours_step_s,
        ours_gflops=size.flops_per_step / ours_step_s / 1e9,
        loss_difference=difference,
        hardware=hardware_name(),
        torch_version=torch.__version__,
        load_before=load_before,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        profiles=profiles,
    )


def top_operations(step: Step) -> str:
    """Where the time of one step goes, by operation, on this process."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return profiled.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=NUM_PROFILED_OPERATIONS, max_name_column_width=50
    )


def hardware_name() -> str:
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _agreed(ratio: Ratio, num_processes: int) -> Ratio:
    """The last process's ratio, so that all decide alike whether to profile."""
    if num_processes == 1:
        return ratio
    values = torch.tensor([ratio.median, ratio.low, ratio.high], dtype=torch.float64)
    dist.broadcast(values, src=num_processes - 1)
    return Ratio(*values.tolist())


if __name__ == "__main__":
    main()
