"""Which samples are read depends on the number consumed and on nothing else."""

import pytest

from megatron.data.sampler import global_batch_indices, microbatch_indices


def by_number(consumed: int, micro_batch_size: int, size: int, num_microbatches: int) -> dict[int, list[int]]:
    """All ranks' micro-batches of a step under their number in the global batch."""
    return {
        i * size + rank: list(samples)
        for rank in range(size)
        for i, samples in enumerate(
            microbatch_indices(
                consumed,
                micro_batch_size=micro_batch_size,
                data_parallel_rank=rank,
                data_parallel_size=size,
                num_microbatches=num_microbatches,
            )
        )
    }


def test_micro_batch_g_holds_the_g_th_run_of_samples_after_the_consumed_ones():
    assert by_number(100, 2, 2, 3) == {g: [100 + 2 * g, 101 + 2 * g] for g in range(6)}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_numbered_micro_batches_are_the_same_for_every_data_parallel_size(size: int):
    assert by_number(64, 3, size, 8 // size) == by_number(64, 3, 1, 8)


def test_a_step_reads_its_global_batch_exactly_once():
    for consumed in (0, 7, 2**40):
        samples = [sample for _, batch in sorted(by_number(consumed, 5, 3, 4).items()) for sample in batch]
        assert samples == list(global_batch_indices(consumed, 60))


def test_consecutive_steps_leave_no_gap_and_no_overlap():
    assert [*global_batch_indices(0, 8), *global_batch_indices(8, 8)] == list(range(16))
