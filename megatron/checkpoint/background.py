"""One piece of work at a time beside the training, and its failure in the hands of who trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundWork(Generic[T]):
    """Runs what it is given in one thread. Whoever gives it asks for the outcome: nothing is raised elsewhere."""

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._future: Future[T] | None = None

    @property
    def has_failed(self) -> bool:
        """True from the moment the work has failed until `wait` has said so."""
        return self._future is not None and self._future.done() and self._future.exception() is not None

    @property
    def is_done(self) -> bool:
        """True if `wait` would return or raise at once, with something."""
        return self._future is not None and self._future.done()

    def start(self, work: Callable[[], T]) -> None:
        assert self._future is None, "wait comes first: what the work in flight reads must not be overwritten"
        self._future = self._thread.submit(work)

    def wait(self) -> T | None:
        """The outcome of the work in flight, once; None if there is none. Raises what the work raised."""
        future, self._future = self._future, None
        return None if future is None else future.result()
