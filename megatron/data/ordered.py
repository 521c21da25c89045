"""Work in threads whose results come out in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    max_ahead: int,
    weigh: Callable[[Item], int] = lambda item: 1,
) -> Generator[Result, None, None]:
    """`map(work, items)` in `workers` threads; the first failure ends it.

    Items that weigh `max_ahead` together are taken before the first result is asked for: one that takes long keeps
    its own thread busy, and the others go on with what follows until then.
    """
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Future[Result], int]] = deque()
        ahead = 0
        try:
            for item in items:
                weight = weigh(item)
                pending.append((pool.submit(work, item), weight))
                del item  # the pool holds it until its work is done, and nobody after that
                ahead += weight
                while ahead >= max_ahead or (pending and pending[0][0].done()):
                    future, weight = pending.popleft()
                    ahead -= weight
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()
