"""Where each rank stands in the grid of parallel axes, and which layers each pipeline stage holds.

Pure numbers: nothing here needs torch or a process group.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import ConfigError


@dataclass(frozen=True)
class Coordinate:
    """The position of one rank on each axis, each counted from 0."""

    pp: int
    dp: int
    tp: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the pipeline, data and tensor axes. The tensor axis varies fastest over ranks, then data."""

    pp: int = 1
    dp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for flag, size in (
            ("--tensor_model_parallel_size", self.tp),
            ("--pipeline_model_parallel_size", self.pp),
            ("the data-parallel size", self.dp),
        ):
            if size < 1:
                raise ConfigError(f"{flag} is {size}: an axis has at least one rank; use 1 or more.")

    @classmethod
    def infer(cls, world_size: int, *, tp: int, pp: int) -> ParallelLayout:
        """The layout of `world_size` ranks whose data axis takes what tensor and pipeline leave.

        Raises ConfigError when `world_size` is not a multiple of ``tp * pp``.
        """
        layout = cls(pp=pp, tp=tp)
        if world_size % (tp * pp):
            raise ConfigError(
                f"{world_size} processes cannot be divided into groups of {tp * pp} "
                f"(--tensor_model_parallel_size {tp} x --pipeline_model_parallel_size {pp}); "
                f"start a multiple of {tp * pp} processes or choose smaller sizes."
            )
        return cls(pp=pp, dp=world_size // (layout.tp * layout.pp), tp=tp)

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    def coordinate(self, rank: int) -> Coordinate:
        return Coordinate(pp=rank // (self.dp * self.tp), dp=rank // self.tp % self.dp, tp=rank % self.tp)

    def rank(self, coordinate: Coordinate) -> int:
        return (coordinate.pp * self.dp + coordinate.dp) * self.tp + coordinate.tp

    def __str__(self) -> str:
        return f"TP{self.tp} PP{self.pp} DP{self.dp}"


def place_layers(
    num_layers: int, num_stages: int, *, embedding_cost: float = 0.0, head_cost: float = 0.0
) -> tuple[range, ...]:
    """Contiguous layers for each stage, so that the most expensive stage is as cheap as can be.

    Costs are in units of one layer; the first stage also pays `embedding_cost`, the last `head_cost`.
    Every stage gets at least one layer. Giving each further layer to the cheapest stage is optimal,
    because all layers cost the same; ties go to the earliest stage.

    Raises ConfigError when there are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ConfigError(
            f"--num_layers {num_layers} cannot fill {num_stages} pipeline stages with a layer each; "
            f"lower --pipeline_model_parallel_size to at most {num_layers}."
        )
    counts = [1] * num_stages
    costs = [1.0] * num_stages
    costs[0] += embedding_cost
    costs[-1] += head_cost
    for _ in range(num_layers - num_stages):
        cheapest = costs.index(min(costs))
        counts[cheapest] += 1
        costs[cheapest] += 1.0
    starts = [sum(counts[:stage]) for stage in range(num_stages)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))
