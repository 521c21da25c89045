"""Random numbers as a function of a key: splitmix64 (Steele, Lea and Flood 2014), the same here and in helpers.cpp."""

from __future__ import annotations

from typing import Final

import numpy as np

_STEP: Final = 0x9E3779B97F4A7C15
_FACTORS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MASK: Final = (1 << 64) - 1


def stream(key: int, number: int) -> int:
    """The key of stream `number` among those of `key`."""
    return _finalised((key ^ mixed(number)) & _MASK)


def mixed(value: int) -> int:
    """The number that follows `value` in its stream: 64 bits that look unlike those of any neighbour."""
    return _finalised((value + _STEP) & _MASK)


def uniforms(key: int, count: int) -> np.ndarray:
    """The first `count` numbers of the stream of `key`: float64 [count] in [0, 1)."""
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(key)
    for shift, factor in _FACTORS:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)) * 2.0**-53


def _finalised(x: int) -> int:
    for shift, factor in _FACTORS:
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 31)
