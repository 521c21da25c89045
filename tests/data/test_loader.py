"""Micro-batches are a function of the consumed samples; the background thread changes nothing."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.data.gpt import GPTDataset, Sample
from megatron.data.indexed import IndexedDataset
from megatron.data.loader import Batch, StepLoader, batches_for_step
from megatron.errors import DataError

BASE = Path(__file__).parent / "samples" / "gpt" / "base"
ONE_RANK = {"micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1, "num_microbatches": 4}


class CountingSamples:
    """Sample i is [10 i, 10 i + 1, ...]; the last label of odd samples does not count."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Sample:
        loss_mask = np.ones(3, dtype=np.float32)
        loss_mask[2] = 1.0 - index % 2
        return Sample(np.arange(10 * index, 10 * index + 4), loss_mask)


def contents(batches: list[Batch]) -> list[tuple[int, list[list[int]]]]:
    return [(batch.index, batch.tokens.tolist()) for batch in batches]


def test_labels_are_the_tokens_one_further():
    first, *_ = batches_for_step(CountingSamples(), 2, **ONE_RANK)
    assert first.tokens.tolist() == [[20, 21, 22], [30, 31, 32]]
    assert first.labels.tolist() == [[21, 22, 23], [31, 32, 33]]
    assert first.loss_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first.position_ids is None and first.index == 0
    assert (first.tokens.dtype, first.labels.dtype, first.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert first.tokens.is_contiguous() and first.labels.is_contiguous()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_numbered_batches_are_the_same_for_every_data_parallel_size(size: int):
    options = {"micro_batch_size": 2, "data_parallel_size": size, "num_microbatches": 4 // size}
    together = [
        batch
        for rank in range(size)
        for batch in batches_for_step(CountingSamples(), 8, data_parallel_rank=rank, **options)
    ]
    serial = contents(batches_for_step(CountingSamples(), 8, **ONE_RANK))
    assert sorted(contents(together)) == serial


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_any_number_of_threads_yields_exactly_the_steps_in_order(num_workers: int):
    with StepLoader(CountingSamples(), 0, **ONE_RANK, num_workers=num_workers) as loader:
        for step in range(5):
            assert loader.consumed_samples == 8 * step
            assert contents(next(loader)) == contents(batches_for_step(CountingSamples(), 8 * step, **ONE_RANK))


def test_resuming_from_the_consumed_samples_continues_the_stream_at_another_size(tmp_path: Path):
    dataset = GPTDataset(IndexedDataset(BASE), range(60), 60, 16, 3, cache_path=tmp_path)
    with StepLoader(dataset, 0, **ONE_RANK) as uninterrupted:
        steps = [contents(next(uninterrupted)) for _ in range(6)]
    with StepLoader(dataset, 0, **ONE_RANK) as loader:
        for _ in range(3):
            next(loader)
        consumed = loader.consumed_samples
    halves = [
        StepLoader(
            dataset, consumed, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2, num_microbatches=2
        )
        for rank in range(2)
    ]
    for step in steps[3:]:
        assert sorted(contents(next(halves[0])) + contents(next(halves[1]))) == step
    for half in halves:
        half.close()


@pytest.mark.parametrize("num_workers", [0, 3])
def test_running_out_of_samples_is_an_error_at_the_step_that_does_and_not_earlier(num_workers: int):
    with StepLoader(CountingSamples(), 0, **ONE_RANK, num_workers=num_workers) as loader:
        for _ in range(5):
            next(loader)
        for _ in range(2):  # asking again is the same error, not a later step
            with pytest.raises(
                DataError, match=r"step after 40 samples reads up to sample 48, .* built for 40; train fewer"
            ):
                next(loader)
        assert loader.consumed_samples == 40


def test_closing_ends_the_threads():
    loader = StepLoader(CountingSamples(), 0, **ONE_RANK)
    next(loader)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


def test_moving_a_batch_keeps_its_contents():
    batch = batches_for_step(CountingSamples(), 0, **ONE_RANK)[1]
    moved = batch.to(torch.device("cpu"))
    assert contents([moved]) == contents([batch])
    assert torch.equal(moved.labels, batch.labels) and torch.equal(moved.loss_mask, batch.loss_mask)
    assert batch.to(torch.device("meta")).tokens.device.type == "meta"
