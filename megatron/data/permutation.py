"""Shuffled orders that are computed, not stored: where item i of a permutation goes, for any i, in constant time."""

from __future__ import annotations

from megatron.data.draws import mixed

_NUM_ROUNDS = 6


def permuted(index: int, size: int, *keys: int) -> int:
    """Return the place of `index` in a permutation of `size` that `keys` choose, the same on every machine.

    A Feistel network over the next even number of bits; a result outside is put in again (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"), which takes less than four turns on average.
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} of a permutation of {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low, seed = (1 << half) - 1, 0
    for key in keys:
        seed = mixed(seed ^ key)
    while True:
        left, right = index >> half, index & low
        for turn in range(_NUM_ROUNDS):
            left, right = right, left ^ (mixed(seed ^ (turn << 56) ^ right) & low)
        index = left << half | right
        if index < size:
            return index
