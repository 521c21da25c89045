"""From samples to the micro-batches of a step, prepared in the background.

Shapes: b micro-batch, s sequence.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.data.sample import PairSample, Sample, SampleSource
from megatron.data.sampler import microbatch_indices
from megatron.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One micro-batch. tokens, labels: int64 [b, s]; loss_mask: float32 [b, s], the weight of each label's loss.

    position_ids: int64 [b, s], or None for 0 to s - 1 in every row. segment_ids: int32 [b, s], the documents that
    attention must not leave, or None where every row is one text. index: the number of the micro-batch in the global
    batch, the same on any data-parallel size; it keys the dropout masks. segment_lengths: of each row's segments, which
    are runs of one id, for kernels that cut the sequence: known here, they need not be read back from a device.

    BERT's pairs of texts: token_types int64 [b, s], which text a token is of; is_random int64 [b], whether the second
    text did not follow the first. Their labels are the tokens before some were hidden.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor | None
    index: int
    segment_ids: Tensor | None = None
    segment_lengths: tuple[tuple[int, ...], ...] | None = None
    token_types: Tensor | None = None
    is_random: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device; asynchronously where the memory is pinned."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            position_ids=_to(self.position_ids, device),
            index=self.index,
            segment_ids=_to(self.segment_ids, device),
            segment_lengths=self.segment_lengths,
            token_types=_to(self.token_types, device),
            is_random=_to(self.is_random, device),
        )


@dataclass(frozen=True)
class Padding:
    """Makes the samples of a micro-batch equally long: by their length, whatever tokens they hold.

    `token` fills up. The length is that of the longest sample, rounded up to `multiple`, and at most `limit`; or always
    `limit`, with `to_limit`. Padding is a segment of its own and counts nothing.
    """

    token: int
    limit: int
    to_limit: bool = True
    multiple: int = 1

    def apply(self, samples: list[Sample]) -> list[Sample]:
        longest = self.limit if self.to_limit else max(len(sample.loss_mask) for sample in samples)
        length = min(self.limit, -(-longest // self.multiple) * self.multiple)
        return [self._padded(sample, length - len(sample.loss_mask)) for sample in samples]

    def _padded(self, sample: Sample, missing: int) -> Sample:
        assert missing >= 0, "a sample is longer than --seq_length"
        positions, segments = sample.position_ids, sample.segment_ids
        return Sample(
            np.concatenate([sample.tokens, np.full(missing, self.token, dtype=np.int64)]),
            np.concatenate([sample.loss_mask, np.zeros(missing, dtype=np.float32)]),
            None if positions is None else np.concatenate([positions, np.arange(missing, dtype=np.int64)]),
            None if segments is None else np.concatenate([segments, np.full(missing, segments[-1] + 1, np.int32)]),
        )


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def batches_for_step(
    dataset: SampleSource,
    consumed_samples: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_microbatches: int,
    padding: Padding | None = None,
) -> list[Batch]:
    """Return this rank's micro-batches of the step that starts after `consumed_samples`, in order.

    Without `padding` all samples of the dataset have one length.
    """
    needed = consumed_samples + micro_batch_size * data_parallel_size * num_microbatches
    if needed > len(dataset):
        raise DataError(
            f"the step after {consumed_samples} samples reads up to sample {needed}, but the dataset was built for "
            f"{len(dataset)}; train fewer iterations, or build it for more samples."
        )
    indices = microbatch_indices(
        consumed_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        num_microbatches=num_microbatches,
    )
    return [
        _collate([dataset[index] for index in samples], number * data_parallel_size + data_parallel_rank, padding)
        for number, samples in enumerate(indices)
    ]


def _collate(samples: list[Sample | PairSample], index: int, padding: Padding | None) -> Batch:
    pairs = [sample for sample in samples if isinstance(sample, PairSample)]
    if pairs:
        return _collate_pairs(pairs, index)
    texts = [sample for sample in samples if isinstance(sample, Sample)]
    return _collate_texts(texts if padding is None else padding.apply(texts), index)


def _collate_texts(samples: list[Sample], index: int) -> Batch:
    tokens = np.stack([sample.tokens for sample in samples])
    segments = [sample.segment_ids for sample in samples]
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])),
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
        position_ids=_stacked([sample.position_ids for sample in samples]),
        index=index,
        segment_ids=_stacked(segments),
        segment_lengths=None
        if segments[0] is None
        else tuple(_run_lengths(row) for row in segments if row is not None),
    )


def _collate_pairs(samples: list[PairSample], index: int) -> Batch:
    """All are of one length, padding included."""
    return Batch(
        tokens=torch.from_numpy(np.stack([sample.tokens for sample in samples])),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples])),
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
        position_ids=None,
        index=index,
        segment_ids=torch.from_numpy(np.stack([sample.segment_ids for sample in samples])),
        segment_lengths=tuple(_run_lengths(sample.segment_ids) for sample in samples),
        token_types=torch.from_numpy(np.stack([sample.token_types for sample in samples])),
        is_random=torch.tensor([int(sample.is_random) for sample in samples]),
    )


def _run_lengths(ids: np.ndarray) -> tuple[int, ...]:
    """ids: [s] -> the lengths of its runs of equal numbers."""
    ends = np.flatnonzero(np.diff(ids)) + 1
    return tuple(np.diff(ends, prepend=0, append=len(ids)).tolist())


def _stacked(rows: list[np.ndarray | None]) -> Tensor | None:
    """None where no sample has a row; all samples of a dataset are alike in this."""
    given = [row for row in rows if row is not None]
    return torch.from_numpy(np.stack(given)) if given else None


class StepLoader:
    """Iterates over the micro-batches of step after step; each of `num_workers` threads prepares one step ahead.

    What it yields is `batches_for_step` of the advancing `consumed_samples` and nothing else; the threads decide
    only when the work is done, and with 0 of them it is done when asked for. An error in a thread is raised by the
    step it belongs to. `consumed_samples` counts the steps handed out, not those prepared.
    """

    def __init__(
        self,
        dataset: SampleSource,
        consumed_samples: int,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_microbatches: int,
        num_workers: int = 2,
        padding: Padding | None = None,
    ):
        self.consumed_samples = consumed_samples
        self._dataset, self._padding = dataset, padding
        self._micro_batch_size = micro_batch_size
        self._data_parallel_rank = data_parallel_rank
        self._data_parallel_size = data_parallel_size
        self._num_microbatches = num_microbatches
        self._global_batch_size = micro_batch_size * data_parallel_size * num_microbatches
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="data") if num_workers else None
        self._num_workers = num_workers
        self._prepared: deque[Future[list[Batch]]] = deque()
        self._prepare_ahead()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._threads is None:
            batches = self._step(self.consumed_samples)
        else:
            batches = self._prepared[0].result()  # stays in front when it raises, so that asking again raises again
            self._prepared.popleft()
        self.consumed_samples += self._global_batch_size
        self._prepare_ahead()
        return batches

    def close(self) -> None:
        """End the threads; steps that are prepared but not handed out are dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "StepLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare_ahead(self) -> None:
        """Give every thread a step, as far as the next ones are not under way."""
        while self._threads is not None and len(self._prepared) < self._num_workers:
            self._prepared.append(
                self._threads.submit(self._step, self.consumed_samples + len(self._prepared) * self._global_batch_size)
            )

    def _step(self, consumed_samples: int) -> list[Batch]:
        return batches_for_step(
            self._dataset,
            consumed_samples,
            micro_batch_size=self._micro_batch_size,
            data_parallel_rank=self._data_parallel_rank,
            data_parallel_size=self._data_parallel_size,
            num_microbatches=self._num_microbatches,
            padding=self._padding,
        )
