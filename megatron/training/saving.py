"""How a checkpoint of a run gets to the disk: while training waits, or while it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.checkpoint.background import BackgroundWork
from megatron.checkpoint.snapshot import HostBuffers
from megatron.checkpoint.source import CheckpointInfo, LocalTensor
from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)


class Saver:
    """Calls ``write`` with what is saved: at once, or in a thread with copies in `buffers` where there are any.

    Every rank calls its methods together and in the same order. They return what to tell whoever watches.
    """

    def __init__(
        self, write: Callable[[CheckpointInfo, Sequence[LocalTensor]], Path], buffers: HostBuffers | None = None
    ):
        self._write, self._buffers = write, buffers
        self._work: BackgroundWork[str] = BackgroundWork("save")
        self._iteration = 0

    @property
    def has_failed(self) -> bool:
        """True on this rank once the save in flight has failed; `finish` then raises on all ranks."""
        return self._work.has_failed

    def save(self, info: CheckpointInfo, tensors: Sequence[LocalTensor]) -> str:
        """Saves, or copies what will be saved; `finish` comes first. Raises CheckpointError if saving at once fails."""
        started = time.perf_counter()
        if self._buffers is None:
            return f"saved {self._write(info, tensors)} in {time.perf_counter() - started:.1f} s"
        copies = self._buffers.copy(tensors)
        self._iteration = info.state.iteration
        self._work.start(lambda: self._write_and_tell(info, copies))
        seconds = time.perf_counter() - started
        return f"copied the state of iteration {self._iteration} in {seconds:.2f} s; it is saved while training goes on"

    def finished(self) -> str | None:
        """What became of the save in flight if it has succeeded and nobody was told; waits for nothing."""
        return self._work.wait() if self._work.is_done and not self.has_failed else None

    def finish(self) -> str | None:
        """Waits for the save in flight. Raises CheckpointError if it failed.

        A lost connection and a bug of our own keep their type and traceback; the log names the save that they hit.
        """
        failed = f"the save of iteration {self._iteration}, which went on in the background, failed"
        try:
            return self._work.wait()
        except CheckpointError as error:
            raise CheckpointError(f"{failed}: {error}") from error
        except Exception as error:
            logger.error("%s: %s: %s", failed, type(error).__name__, error)
            raise

    def abandon(self) -> None:
        """Waits for the save in flight when the run ends with another error, which its own failure must not hide."""
        try:
            self.finish()
        except Exception as error:
            logger.warning("%s", error)

    def _write_and_tell(self, info: CheckpointInfo, copies: Sequence[LocalTensor]) -> str:
        started = time.perf_counter()
        folder = self._write(info, copies)
        return f"saved {folder} in {time.perf_counter() - started:.1f} s, while training went on"
