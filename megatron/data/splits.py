"""Cutting one dataset into training, validation and test documents (``--split "969, 30, 1"``)."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron.errors import ConfigError

SPLIT_NAMES = ("train", "valid", "test")


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
