"""Cutting one dataset into training, validation and test documents (``--split "969, 30, 1"``)."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from megatron.data.gpt import GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.errors import ConfigError, DataError

SPLIT_NAMES = ("train", "valid", "test")

# How many samples each split has to give; None means exactly one epoch, 0 that the split is not wanted.
SampleCounts = tuple[int | None, int | None, int | None]
GPTSplits = tuple[GPTDataset | None, GPTDataset | None, GPTDataset | None]


def parse_split(text: str) -> tuple[float, float, float]:
    """Return the normalised shares of training, validation and test; a share that is left out is 0."""
    separator = "/" if "/" in text else ","
    parts = [part.strip() for part in text.split(separator)]
    try:
        weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        raise ConfigError(
            f"--split {text!r} is not one to three shares of train, valid and test that are not negative and not all "
            f'zero, separated by "," or "/"; use for example --split 969,30,1.'
        )
    train, valid, test = (weight / sum(weights) for weight in [*weights, 0.0, 0.0][:3])
    return train, valid, test


def split_documents(shares: Sequence[float], num_documents: int) -> tuple[range, ...]:
    """Cut `num_documents` at the rounded running sums of the shares, as Megatron-LM does: small shares may get none."""
    bounds = [round(share * float(num_documents)) for share in accumulate(shares, initial=0.0)]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def build_gpt_splits(
    indexed: IndexedDataset,
    split: str,
    num_samples: SampleCounts,
    *,
    sequence_length: int,
    seed: int,
    cache_path: Path | None = None,
) -> GPTSplits:
    """Build the datasets of train, valid and test; None for one of which 0 samples are wanted.

    Raises `DataError` when samples are wanted of a split that got no documents.
    """
    shares = parse_split(split)
    ranges = split_documents(shares, len(indexed))
    for name, documents, wanted in zip(SPLIT_NAMES, ranges, num_samples, strict=True):
        if wanted != 0 and len(documents) == 0:
            raise DataError(
                f"{indexed.prefix}: --split {split!r} of {len(indexed)} documents leaves none for {name} (wanted: "
                f"{'one epoch' if wanted is None else f'{wanted} samples'}); give {name} a larger share, use more "
                f"documents, or ask for no {name} samples (--eval_iters 0 for valid and test)."
            )
    train, valid, test = (
        GPTDataset(indexed, documents, wanted, sequence_length, seed, cache_path=cache_path) if wanted != 0 else None
        for documents, wanted in zip(ranges, num_samples, strict=True)
    )
    return train, valid, test
