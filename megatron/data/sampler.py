"""Which samples a step reads: a pure function of how many have been consumed.

Nothing here has a state, so resuming a run, at the same or at another data-parallel size, takes one integer.
"""


def global_batch_indices(consumed_samples: int, global_batch_size: int) -> range:
    """Return the samples of the step that starts after `consumed_samples`."""
    return range(consumed_samples, consumed_samples + global_batch_size)


def microbatch_indices(
    consumed_samples: int,
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_microbatches: int,
) -> list[range]:
    """Return the samples of each of one rank's micro-batches in the step.

    Micro-batch i of data-parallel rank r is number ``i * data_parallel_size + r`` of the step, and the numbered
    micro-batches cut the global batch from its start: any data-parallel size reads the same ones.
    """
    batch = global_batch_indices(consumed_samples, micro_batch_size * data_parallel_size * num_microbatches)
    numbers = range(data_parallel_rank, data_parallel_size * num_microbatches, data_parallel_size)
    return [batch[g * micro_batch_size : (g + 1) * micro_batch_size] for g in numbers]
