"""What a dataset hands out, whatever it is made of.

Legend: s sequence length of the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """tokens: int64 [s + 1], inputs are [:-1] and labels [1:]. loss_mask: float32 [s], the weight of each label's loss.

    position_ids: int64 [s], or None for 0 to s - 1. segment_ids: int32 [s], which of the documents in the sample an
    input belongs to, where attention must not cross their bounds; None for one text.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray | None = None
    segment_ids: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PairSample:
    """BERT's: two texts and padding. tokens: int64 [s], as the model sees them; labels: int64 [s], as they were.

    loss_mask: float32 [s], 1 where a token is to be restored. token_types: int64 [s], 1 for the second text.
    segment_ids: int32 [s], padding is a segment of its own. is_random: whether the second text did not follow.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    token_types: np.ndarray
    segment_ids: np.ndarray
    is_random: bool


class SampleSource(Protocol):
    """Random access to samples; all of one source are of one kind."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample | PairSample: ...


class TrainingData(SampleSource, Protocol):
    """What a run trains on: samples in an order that was laid out for a number of them."""

    def has_same_order_for(self, num_samples: int | None) -> bool:
        """Whether this data, laid out for `num_samples` instead, would serve the same samples in the same order."""
