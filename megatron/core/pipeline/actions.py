"""What a pipeline rank does, as data: actions, the placement of stages on ranks, and schedules.

A model is cut into *stages*, numbered in the order in which a micro-batch passes them. A rank holds
one stage, or several (its *chunks*) when the schedule is interleaved. A schedule says, for each rank,
which stage works on which micro-batch in which order. It names no time and no tensor; `simulate`
adds the former, the executor the latter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class ActionKind(str, Enum):
    """``B`` is the whole backward pass of a stage; ``I`` and ``W`` are its halves, one for the gradient
    of the input and one for the gradient of the weights. Sends and receives exist after lowering only:
    ``_F`` moves an output to the next stage, ``_B`` the gradient of an input to the stage before."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741  (the field's own letter)
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    @property
    def is_send(self) -> bool:
        return self in (ActionKind.SEND_F, ActionKind.SEND_B)

    @property
    def is_receive(self) -> bool:
        return self in (ActionKind.RECV_F, ActionKind.RECV_B)

    @property
    def is_communication(self) -> bool:
        return self.is_send or self.is_receive


class Value(NamedTuple):
    """A tensor that one stage hands to a neighbour: its output, or the gradient of its input."""

    is_gradient: bool
    stage: int
    microbatch: int

    def __str__(self) -> str:
        what = "input gradient" if self.is_gradient else "output"
        return f"the {what} of stage {self.stage} for micro-batch {self.microbatch}"


class Action(NamedTuple):
    """One step of one rank. `stage` is the stage on the rank that acts, for sends and receives too.

    The text form is stage, kind, micro-batch: ``3F0``, ``0SEND_F2``.
    """

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action with this text form; ValueError when there is none."""
        match = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is not an action; write stage, kind, micro-batch, as in 3F0 or 0SEND_F2")
        return cls(ActionKind(match[2]), int(match[1]), int(match[3]))

    @property
    def produces(self) -> Value | None:
        """The value that exists once this computation has run; None for `W` and for communication."""
        if self.kind is ActionKind.F:
            return Value(False, self.stage, self.microbatch)
        if self.kind is ActionKind.B or self.kind is ActionKind.I:
            return Value(True, self.stage, self.microbatch)
        return None

    def requires(self, num_stages: int) -> Value | None:
        """The value this computation cannot start without; None for the first stage's forward pass.

        One value says it all: the output gradient that a backward pass waits for exists only after the
        forward passes of all stages, its own included.
        """
        _, stage, microbatch = self
        if self.kind is ActionKind.F:
            return Value(False, stage - 1, microbatch) if stage > 0 else None
        if self.kind is ActionKind.W:
            return Value(True, stage, microbatch)
        if stage == num_stages - 1:
            return Value(False, stage, microbatch)
        return Value(True, stage + 1, microbatch)

    @property
    def carries(self) -> Value:
        """The value that a send or a receive moves; a value is named by the stage that produced it."""
        send = self if self.kind.is_send else self.counterpart
        return Value(send.kind is ActionKind.SEND_B, send.stage, send.microbatch)

    @property
    def counterpart(self) -> Action:
        """The receive that belongs to a send, or the send that belongs to a receive."""
        _, stage, microbatch = self
        match self.kind:
            case ActionKind.SEND_F:
                return Action(ActionKind.RECV_F, stage + 1, microbatch)
            case ActionKind.RECV_F:
                return Action(ActionKind.SEND_F, stage - 1, microbatch)
            case ActionKind.SEND_B:
                return Action(ActionKind.RECV_B, stage - 1, microbatch)
            case ActionKind.RECV_B:
                return Action(ActionKind.SEND_B, stage + 1, microbatch)
        raise ValueError(f"{self} is a computation and has no counterpart")


@dataclass(frozen=True)
class Placement:
    """Which rank holds which stage: `stage_ranks[stage]` is the rank. Every rank holds equally many."""

    stage_ranks: tuple[int, ...]

    @classmethod
    def loop(cls, num_ranks: int, num_chunks: int = 1) -> Placement:
        """Stage s on rank s % num_ranks: a micro-batch goes round the ranks `num_chunks` times."""
        return cls(tuple(range(num_ranks)) * num_chunks)

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    @property
    def num_ranks(self) -> int:
        return max(self.stage_ranks) + 1

    @property
    def num_chunks(self) -> int:
        """Stages per rank."""
        return self.num_stages // self.num_ranks

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages of a rank, in the order of the model; a stage's index here is its chunk."""
        return tuple(stage for stage, holder in enumerate(self.stage_ranks) if holder == pipeline_rank)


@dataclass(frozen=True)
class Schedule:
    """The computations of every rank in order: `ranks[pipeline_rank]`. `has_backward` is false for evaluation."""

    name: str
    placement: Placement
    num_microbatches: int
    ranks: tuple[tuple[Action, ...], ...]
    has_backward: bool = True


class ScheduleError(ValueError):
    """A schedule or program that cannot run as written: a bug in whatever made it, not in a flag."""

    def __init__(self, pipeline_rank: int, position: int, action: Action, reason: str):
        super().__init__(f"pipeline rank {pipeline_rank}, position {position}, {action}: {reason}")
        self.pipeline_rank = pipeline_rank
        self.position = position
        self.action = action
