"""From a schedule to a program: the sends and receives between the computations.

Think of every message as one event that two ranks share. All computations and messages of all ranks are
put into *one* order, that of simulated time, and each rank's program is the part of this order that
concerns the rank. So the programs cannot deadlock, even if each send waits until its peer receives:
the first unfinished event of the common order can always run. Two ranks also agree on the order of the
messages between them, which is how gloo and NCCL match them. (Sends and receives inserted locally,
around each action, have neither property: in 1F1B two neighbours would both send first.)

A computation stands in the common order where it *ends*, with its message right behind it. A value that
becomes ready while its receiver computes thus stands before that computation in the receiver's program:
an executor that posts receives without waiting posts it one computation ahead, and the transfer overlaps.
In the steady state of 1F1B two neighbours end at the same time and exchange an output for a gradient. Then
the lower rank goes first, so that it is the outputs that are received ahead: the last stage, which
has the head and is often the slowest, does not wait for a transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter

from megatron.core.pipeline.actions import Action, ActionKind, Placement, Schedule
from megatron.core.pipeline.simulation import Costs, simulate


@dataclass(frozen=True)
class Program:
    """What each rank executes: `ranks[pipeline_rank]`, computations, sends and receives in order.

    An executor may post a send or a receive without waiting for it, as long as it posts in this order,
    waits for a receive before the computation that requires it, and keeps a sent tensor until the send
    is done. It may post sends and receives that stand side by side as one group. A value whose producer
    and consumer share a rank has no message: the rank hands it over itself.
    """

    schedule: Schedule
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def placement(self) -> Placement:
        return self.schedule.placement

    def peer(self, action: Action) -> int:
        """The pipeline rank at the other end of a send or a receive."""
        return self.placement.stage_ranks[action.counterpart.stage]


def lower(schedule: Schedule, costs: Costs | None = None) -> Program:
    """Insert sends and receives. `costs` (default: equal stages) decides the order of messages only.

    Raises ScheduleError if the schedule cannot run.
    """
    stage_ranks = schedule.placement.stage_ranks
    by_rank = enumerate(simulate(schedule, costs).spans)
    events = [(span.end, pipeline_rank, span.action) for pipeline_rank, spans in by_rank for span in spans]
    # The sort is stable. Computations of two ranks that end together do not depend on each other, for a
    # computation that has an input takes time.
    events.sort(key=itemgetter(0, 1))

    ranks: list[list[Action]] = [[] for _ in schedule.ranks]
    for _, pipeline_rank, action in events:
        ranks[pipeline_rank].append(action)
        send = _send(action, schedule.placement)
        if send is not None:
            receive = send.counterpart
            ranks[pipeline_rank].append(send)
            ranks[stage_ranks[receive.stage]].append(receive)
    return Program(schedule, tuple(map(tuple, ranks)))


def _send(action: Action, placement: Placement) -> Action | None:
    """The send that takes what `action` produces to another rank, if anything has to go there."""
    produced = action.produces
    if produced is None:
        return None
    consumer = action.stage + (-1 if produced.is_gradient else 1)
    if not 0 <= consumer < placement.num_stages:
        return None
    if placement.stage_ranks[consumer] == placement.stage_ranks[action.stage]:
        return None
    return Action(ActionKind.SEND_B if produced.is_gradient else ActionKind.SEND_F, action.stage, action.microbatch)
