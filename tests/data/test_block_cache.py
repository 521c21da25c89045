"""Blocks of far files: the right bytes for any spans, within the bound, and few requests."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from megatron.data.block_cache import BlockCache

BLOCK = 16


class Source:
    def __init__(self, num_bytes: int):
        self.content = np.random.default_rng(num_bytes).bytes(num_bytes)
        self.asked: list[tuple[int, int]] = []

    def __call__(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.asked.extend(ranges)
        return [self.content[start:stop] for start, stop in ranges]


def test_spans_are_right_and_memory_is_bounded_whatever_the_order() -> None:
    random, files = np.random.default_rng(0), {"a": Source(1000), "b": Source(333)}
    cache = BlockCache(capacity_bytes=10 * BLOCK, block_bytes=BLOCK)
    for _ in range(500):
        name = ("a", "b")[int(random.integers(2))]
        source = files[name]
        spans = [tuple(sorted(random.integers(0, len(source.content) + 1, 2).tolist())) for _ in range(3)]
        read = cache.read(name, len(source.content), spans, source)
        assert read == [source.content[start:stop] for start, stop in spans]
        assert cache.num_bytes <= 10 * BLOCK


def test_neighbouring_blocks_come_in_one_request_up_to_eight() -> None:
    source = Source(20 * BLOCK)
    BlockCache(block_bytes=BLOCK).read("a", 20 * BLOCK, [(0, 9 * BLOCK), (12 * BLOCK, 12 * BLOCK + 1)], source)
    assert source.asked == [(0, 8 * BLOCK), (8 * BLOCK, 9 * BLOCK), (12 * BLOCK, 13 * BLOCK)]


def test_the_longest_unused_block_goes_first() -> None:
    source, cache = Source(10 * BLOCK), BlockCache(capacity_bytes=2 * BLOCK, block_bytes=BLOCK)
    for block in (0, 1, 0, 2, 0, 1):  # 1 makes room for 2
        cache.read("a", 10 * BLOCK, [(block * BLOCK, block * BLOCK + 1)], source)
    assert [start // BLOCK for start, _ in source.asked] == [0, 1, 2, 1]


def test_threads_read_what_one_would() -> None:
    source, cache = Source(4000), BlockCache(capacity_bytes=20 * BLOCK, block_bytes=BLOCK)
    spans = [tuple(sorted(np.random.default_rng(i).integers(0, 4001, 2).tolist())) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda span: cache.read("a", 4000, [span], source)[0], spans))
    assert read == [source.content[start:stop] for start, stop in spans]
