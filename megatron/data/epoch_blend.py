"""Datasets of samples of their own, conversations or pairs of texts, served in shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from megatron.data import helpers
from megatron.data.sample import PairSample, Sample, SampleSource
from megatron.errors import DataError


class EpochSource(SampleSource, Protocol):
    """Samples of any number of epochs; those of fewer samples are the first of those of more."""

    @property
    def samples_per_epoch(self) -> int: ...


class EpochBlend:
    """Datasets in shares: each time the one is served that is furthest behind, exact at every prefix.

    A member makes a dataset for a number of samples; without `weights` its share is its size. `max_epochs` limits how
    often each is read; the others then share what is left.
    """

    def __init__(
        self,
        members: Sequence[Callable[[int], EpochSource]],
        num_samples: int,
        weights: tuple[float, ...] | None,
        max_epochs: float | None,
    ):
        sizes = [member(0).samples_per_epoch for member in members]
        limits = [2**62 if max_epochs is None else int(size * max_epochs) for size in sizes]
        self._room = sum(limits)
        if self._room < num_samples:
            raise DataError(
                f"--max_epochs_per_dataset {max_epochs:g} leaves {self._room} samples, and {num_samples} are wanted; "
                "train fewer iterations, allow more epochs, or add data."
            )
        shares = [float(size) for size in sizes] if weights is None else list(weights)
        self.dataset_index, self._positions = helpers.build_blend_index(shares, limits, num_samples)
        counts = np.bincount(self.dataset_index, minlength=len(members)).tolist()
        self.datasets = tuple(member(count) for member, count in zip(members, counts, strict=True))

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> Sample | PairSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a blend of {len(self)}")
        dataset, own = self.place(index)
        return self.datasets[dataset][own]

    def place(self, index: int) -> tuple[int, int]:
        """Which dataset serves sample `index`, and which of its samples that is."""
        return int(self.dataset_index[index]), int(self._positions[index])

    def has_same_order_for(self, num_samples: int | None) -> bool:
        """The blend of fewer samples is the beginning of that of more, as far as ``max_epochs`` leaves room."""
        return num_samples is not None and num_samples <= self._room
