"""Parts of far files, kept in memory in whole blocks as long as there is room; the longest unused go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

# A request takes as long as the transfer of a megabyte, more or less: small enough that reading documents in random
# order does not load ten times what it needs, large enough that neighbours come along.
_BLOCK_BYTES: Final = 1 << 17
_CAPACITY_BYTES: Final = 1 << 28
_MAX_BLOCKS_A_RANGE: Final = 8

ReadRanges = Callable[[Sequence[tuple[int, int]]], Sequence[bytes]]
"""The bytes of ranges (start, stop)."""


class BlockCache:
    """At most `capacity_bytes` of blocks, of any number of files; many threads may read at once."""

    def __init__(self, capacity_bytes: int = _CAPACITY_BYTES, block_bytes: int = _BLOCK_BYTES):
        self.num_bytes = 0
        self._capacity_bytes, self._block_bytes = capacity_bytes, block_bytes
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, name: str, file_bytes: int, spans: Sequence[tuple[int, int]], read_ranges: ReadRanges
    ) -> list[bytes]:
        """The bytes of each span (start, stop) of the file `name`; `read_ranges` is asked for the blocks not here."""
        size = self._block_bytes
        needed = sorted({block for start, stop in spans if start < stop for block in _blocks(start, stop, size)})
        here = self._here(name, needed)
        runs = list(_runs(block for block in needed if block not in here))
        ranges = [(run.start * size, min(run.stop * size, file_bytes)) for run in runs]
        # Outside the lock: other threads read on. Two may load one block, which costs time and nothing else.
        loaded = {}
        for run, content in zip(runs, read_ranges(ranges) if ranges else [], strict=True):
            for i, block in enumerate(run):
                loaded[block] = content[i * size : (i + 1) * size]
        self._keep(name, loaded)
        here.update(loaded)
        return [_joined(here, start, stop, size) for start, stop in spans]

    def _here(self, name: str, blocks: Iterable[int]) -> dict[int, bytes]:
        found = {}
        with self._lock:
            for block in blocks:
                if (name, block) in self._blocks:
                    self._blocks.move_to_end((name, block))
                    found[block] = self._blocks[name, block]
        return found

    def _keep(self, name: str, loaded: dict[int, bytes]) -> None:
        with self._lock:
            for block, content in loaded.items():
                if (name, block) not in self._blocks:
                    self._blocks[name, block] = content
                    self.num_bytes += len(content)
            while self.num_bytes > self._capacity_bytes:
                self.num_bytes -= len(self._blocks.popitem(last=False)[1])


def _blocks(start: int, stop: int, size: int) -> range:
    return range(start // size, (stop - 1) // size + 1)


def _runs(blocks: Iterable[int]) -> Iterable[range]:
    """Neighbours in one request, up to a length at which several requests side by side are faster."""
    run = range(0)
    for block in blocks:
        if run and block == run.stop and len(run) < _MAX_BLOCKS_A_RANGE:
            run = range(run.start, block + 1)
            continue
        if run:
            yield run
        run = range(block, block + 1)
    if run:
        yield run


def _joined(here: dict[int, bytes], start: int, stop: int, size: int) -> bytes:
    if start >= stop:
        return b""
    blocks = _blocks(start, stop, size)
    whole = here[blocks[0]] if len(blocks) == 1 else b"".join(here[block] for block in blocks)
    first = blocks.start * size
    return whole[start - first : stop - first]
