"""The C++ blend index equals the rule it follows, step by step in Python."""

import numpy as np
import pytest

from megatron.data.helpers import build_blend_index

NO_LIMIT = 2**62


def oracle(weights: list[float], limits: list[int], num_samples: int) -> tuple[list[int], list[int]]:
    """Serve whoever is furthest behind; shares are counted anew whenever somebody is out of samples."""
    datasets: list[int] = []
    samples: list[int] = []
    counts = [0] * len(weights)
    while len(datasets) < num_samples:
        present = [d for d, w in enumerate(weights) if w > 0 and counts[d] < limits[d]]
        total = sum(w if d in present else 0.0 for d, w in enumerate(weights))
        since, served = [0] * len(weights), 0
        while len(datasets) < num_samples and all(counts[d] < limits[d] for d in present):
            deficits = {d: weights[d] / total * max(served, 1) - since[d] for d in present}
            chosen = max(present, key=lambda d: (deficits[d], -d))
            datasets.append(chosen)
            samples.append(counts[chosen])
            counts[chosen] += 1
            since[chosen] += 1
            served += 1
    return datasets, samples


def test_the_index_equals_the_python_oracle_on_random_weights_and_limits():
    random = np.random.default_rng(3)
    for _ in range(200):
        num_datasets = int(random.integers(1, 40))
        # Some weights are equal and some are not, in any mixture, so that few or many differ; some are zero, some
        # limits bind.
        equal = random.choice([0.0, 0.1, 0.1, 0.25, 1.0, 3.0], num_datasets)
        weights = np.where(random.random(num_datasets) < random.random(), random.random(num_datasets), equal)
        weights[random.integers(num_datasets)] = 0.5
        limits = random.choice([0, 1, 7, 40, NO_LIMIT], num_datasets)
        limits[np.flatnonzero(weights)[0]] = NO_LIMIT
        num_samples = int(random.integers(0, 300))
        datasets, samples = build_blend_index(weights.tolist(), limits.tolist(), num_samples)
        assert (datasets.tolist(), samples.tolist()) == oracle(weights.tolist(), limits.tolist(), num_samples)
        assert (datasets.dtype, samples.dtype) == (np.uint16, np.int64)


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.3],
        [1.0] * 7,
        range(1, 8),
        [0.5**i for i in range(20)],  # a wrong guess stays wrong for thousands of samples
        np.random.default_rng(1).lognormal(0, 2, 60),
    ],
    ids=["two", "equal", "tied", "halves", "many"],
)
def test_a_long_blend_that_is_built_from_many_places_equals_one_built_step_by_step(weights):
    weights, num_samples = np.array(weights, np.float64), 80_000
    # The largest dataset ends in the middle: what comes after begins anew, with the other shares.
    limits = np.full(len(weights), NO_LIMIT)
    limits[weights.argmax()] = round(weights.max() / sum(weights.tolist()) * 40_000)
    expected, counts, start = np.empty(num_samples, np.int64), np.zeros_like(limits), 0
    present = np.ones(len(weights), bool)
    while start < num_samples:
        shares = np.where(present, weights, 0.0) / sum(weights[present].tolist())
        since = np.where(present, 0.0, np.inf)
        for step in range(start, num_samples):
            chosen = int(np.argmax(shares * max(step - start, 1) - since))
            expected[step] = chosen
            since[chosen] += 1.0
            counts[chosen] += 1
            if counts[chosen] == limits[chosen]:
                present[chosen] = False
                break
        start = step + 1
    datasets, samples = build_blend_index(weights.tolist(), limits.tolist(), num_samples)
    assert np.array_equal(datasets, expected)
    for dataset, count in enumerate(counts):
        assert np.array_equal(samples[datasets == dataset], np.arange(count))


@pytest.mark.parametrize("weights", [[1, 3, 2, 1, 1], [*range(15, 0, -1), 8]], ids=["few", "many"])
def test_of_equal_deficits_the_first_dataset_is_served(weights: list[float]):
    """The weights add up to a power of two, so that deficits of unlike shares are exact, and often equal."""
    limits = [NO_LIMIT] * len(weights)
    assert tuple(index.tolist() for index in build_blend_index(weights, limits, 300)) == oracle(weights, limits, 300)


@pytest.mark.parametrize("weights", [[1.0] * 7, [0.5, 0.3, 0.2], [0.9, *[0.001] * 100], [3, 1, 4, 1, 5, 9, 2, 6]])
def test_every_prefix_holds_its_shares(weights: list[float]):
    """Nobody is ever one sample ahead of his share, nor much behind: the deficits sum to zero."""
    datasets, _ = build_blend_index(weights, [NO_LIMIT] * len(weights), 3000)
    counts = np.cumsum(datasets[:, None] == np.arange(len(weights)), axis=0)
    shares = np.array(weights) / sum(weights) * np.arange(1, 3001)[:, None]
    assert np.abs(counts - shares).max() < 1.0 + 1e-9 if len(weights) < 10 else (counts - shares).max() < 1.0


def test_a_shorter_blend_is_the_beginning_of_a_longer_one():
    weights, limits = [0.7, 0.1, 0.2], [NO_LIMIT, 20, 1000]
    longer = build_blend_index(weights, limits, 500)
    shorter = build_blend_index(weights, limits, 333)
    assert all(np.array_equal(a[:333], b) for a, b in zip(longer, shorter, strict=True))


@pytest.mark.parametrize(
    ("weights", "limits", "num_samples", "reason"),
    [
        ([], [], 1, "0 datasets"),
        ([1.0], [1, 2], 1, "2 limits for 1 datasets"),
        ([-1.0, 1.0], [5, 5], 1, "is not a share"),
        ([float("nan")], [5], 1, "is not a share"),
        ([float("inf")], [5], 1, "is not a share"),
        ([0.0, 0.0], [5, 5], 1, r"1 samples are not in \[0, 0\]"),
        ([1.0, 1.0], [5, 4], 10, r"10 samples are not in \[0, 9\]"),
        ([1.0], [5], -1, "-1 samples"),
    ],
)
def test_what_cannot_be_served_is_an_exception(weights, limits, num_samples, reason):
    with pytest.raises(ValueError, match=reason):
        build_blend_index(weights, limits, num_samples)
