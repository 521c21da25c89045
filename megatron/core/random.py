"""Randomness as a function: the same key gives the same numbers, on any layout, in any order, with nothing to save.

Initial weights depend on (seed, name of the logical tensor, position in it). A dropout mask depends on
(seed, step, micro-batch, layer, site, and the tensor rank where the activation is sharded).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Tiles in which weights are drawn. A rank draws the tiles its rectangle touches, never a whole large tensor.
TILE_ROWS, TILE_COLUMNS = 256, 1024


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key`. Stable across processes, platforms and versions."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def normal_slice(seed: int, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """The rectangle [start, start + size) of the standard normal tensor called `name`: float32 on the CPU.

    One or two dimensions. The tensor is defined by its tiles of TILE_ROWS x TILE_COLUMNS, each drawn
    from its own seed, so a rectangle does not depend on how the rest is cut.
    """
    row, column = start if len(start) == 2 else (0, *start)
    rows, columns = size if len(size) == 2 else (1, *size)
    result = torch.empty(rows, columns)
    generator = torch.Generator()
    for i in range(row // TILE_ROWS, -(-(row + rows) // TILE_ROWS)):
        for j in range(column // TILE_COLUMNS, -(-(column + columns) // TILE_COLUMNS)):
            generator.manual_seed(derive_seed(seed, name, i, j))
            tile = torch.randn(TILE_ROWS, TILE_COLUMNS, generator=generator)
            top, left = i * TILE_ROWS, j * TILE_COLUMNS
            r = slice(max(row, top), min(row + rows, top + TILE_ROWS))
            c = slice(max(column, left), min(column + columns, left + TILE_COLUMNS))
            result[r.start - row : r.stop - row, c.start - column : c.stop - column] = tile[
                r.start - top : r.stop - top, c.start - left : c.stop - left
            ]
    return result.reshape(size)


@dataclass(frozen=True)
class DropoutStreams:
    """The random streams of one micro-batch in one step. `microbatch` counts over the whole global batch."""

    seed: int
    step: int
    microbatch: int

    def dropout(self, x: Tensor, p: float, *, layer: int, site: str, shard: int = 0) -> Tensor:
        """Dropout whose mask depends on this stream, the global layer, the site, and the shard of the activation."""
        if p == 0.0:
            return x
        generator = torch.Generator(x.device).manual_seed(self._seed(layer, site, shard))
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - p, generator=generator)
        return x * keep * (1.0 / (1.0 - p))

    @contextmanager
    def default_generator(self, device: torch.device, *, layer: int, site: str, shard: int = 0) -> Iterator[None]:
        """Seeds the device's default generator, for kernels that draw their own mask, and restores it after."""
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices, device_type="cuda"):
            seed = self._seed(layer, site, shard)
            (torch.cuda if device.type == "cuda" else torch).manual_seed(seed)
            yield

    def _seed(self, layer: int, site: str, shard: int) -> int:
        return derive_seed(self.seed, self.step, self.microbatch, layer, site, shard)
