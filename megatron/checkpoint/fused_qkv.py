"""Which rows of a fused tensor are rows of its parts. Weights and biases alike: only dimension 0 is spoken of.

*Grouped* order (Megatron's, and Falcon's in the Hugging Face format): for each key/value head the query heads that
it serves, then its keys, then its values. With as many key/value heads as query heads that is q k v, q k v, ...;
with one it is all of q, then k, then v. *Stacked* order is one whole part after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowRun:
    """Rows [part_row, part_row + num_rows) of `part` are the rows from `fused_row` on of the fused tensor."""

    part: str
    part_row: int
    fused_row: int
    num_rows: int

    def within_part(self, first: int, num_rows: int) -> RowRun | None:
        """What the run holds of the rows [first, first + num_rows) of its part; None if that is nothing."""
        return self._cut(first - self.part_row, num_rows)

    def within_fused(self, first: int, num_rows: int) -> RowRun | None:
        """What the run holds of the rows [first, first + num_rows) of the fused tensor; None if that is nothing."""
        return self._cut(first - self.fused_row, num_rows)

    def _cut(self, first: int, num_rows: int) -> RowRun | None:
        skipped, end = max(0, first), min(self.num_rows, first + num_rows)
        if end <= skipped:
            return None
        return replace(
            self, part_row=self.part_row + skipped, fused_row=self.fused_row + skipped, num_rows=end - skipped
        )


def grouped_qkv(num_heads: int, num_heads_kv: int, head_dim: int) -> tuple[RowRun, ...]:
    """The runs of parts "q", "k" and "v" in grouped order, in the order of the fused rows."""
    q_rows = num_heads // num_heads_kv * head_dim
    group_rows = q_rows + 2 * head_dim
    return tuple(_groups(num_heads_kv, q_rows, head_dim, group_rows))


def stacked(num_rows: Mapping[str, int]) -> tuple[RowRun, ...]:
    """The runs of parts that lie one after another; `num_rows` of each part, in their order."""
    runs, fused_row = [], 0
    for part, rows in num_rows.items():
        runs.append(RowRun(part, 0, fused_row, rows))
        fused_row += rows
    return tuple(runs)


def split_rows(fused: Tensor, runs: Sequence[RowRun]) -> dict[str, Tensor]:
    """The parts of a whole fused tensor, each of them new. The inverse of `join_rows`."""
    pieces: dict[str, list[Tensor]] = {}
    for run in sorted(runs, key=lambda run: run.part_row):
        pieces.setdefault(run.part, []).append(fused[run.fused_row : run.fused_row + run.num_rows])
    return {part: torch.cat(rows) for part, rows in pieces.items()}


def join_rows(parts: Mapping[str, Tensor], runs: Sequence[RowRun]) -> Tensor:
    """The fused tensor made of whole `parts`."""
    ordered = sorted(runs, key=lambda run: run.fused_row)
    return torch.cat([parts[run.part][run.part_row : run.part_row + run.num_rows] for run in ordered])


def _groups(num_groups: int, q_rows: int, head_dim: int, group_rows: int) -> Iterator[RowRun]:
    for group in range(num_groups):
        first = group * group_rows
        yield RowRun("q", group * q_rows, first, q_rows)
        yield RowRun("k", group * head_dim, first + q_rows, head_dim)
        yield RowRun("v", group * head_dim, first + q_rows + head_dim, head_dim)
