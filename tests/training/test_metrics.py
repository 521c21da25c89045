"""Wall times become the figures of a log line."""

import pytest
import torch

from megatron.model.flops import flops_per_token
from megatron.training.checkpointing import Progress
from megatron.training.metrics import StepClock, peak_memory_bytes
from megatron.training.step import StepResult
from small_run import small_run

RESULT = StepResult(loss=2.5, grad_norm=0.75, valid_tokens=900, num_tokens=2048)
CPU = torch.device("cpu")


class WallClock:
    """A clock that stands where the test puts it."""

    time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


def test_speeds_are_means_over_the_steps_since_the_last_logged_one():
    run = small_run(4, global_batch_size=16, tensor_model_parallel_size=2)
    clock = StepClock(run, CPU, 0)
    clock.add(1.0, 5)
    clock.metrics(Progress(1, 16), RESULT, 1e-3)
    clock.add(2.0, 2000)
    clock.add(4.0, 1000)
    metrics = clock.metrics(Progress(3, 48), RESULT, 5e-4)
    assert metrics.step_time_s == 3.0
    assert metrics.tokens_per_s == 500.0
    expected_flops_per_s = 500.0 * flops_per_token(run.model, 128)
    assert metrics.tflops_per_gpu == pytest.approx(expected_flops_per_s / 4 / 1e12, rel=1e-12)
    assert (metrics.iteration, metrics.consumed_samples, metrics.learning_rate) == (3, 48, 5e-4)
    assert (metrics.lm_loss, metrics.grad_norm, metrics.valid_tokens) == (2.5, 0.75, 900)


def test_the_eta_counts_evaluations_and_checkpoints_but_not_the_first_iteration():
    wall = WallClock()
    clock = StepClock(small_run(train_iters=20), CPU, 10, now=wall)
    etas = []
    for iteration, iteration_ends_at in ((11, 60.0), (12, 62.0), (13, 70.0)):
        clock.add(1.0, 1)
        wall.time_s = iteration_ends_at  # one second is the step's, the rest goes to evaluation and saving
        etas.append(clock.metrics(Progress(iteration, 0), RESULT, 1e-3).eta_s)
        clock.resume()
    # After iteration 12: 8 are left at 2 s each. After 13: 7 are left at (2 + 8) / 2 s each.
    assert etas == [None, 16.0, 35.0]


def test_a_run_of_one_iteration_has_nothing_left():
    clock = StepClock(small_run(train_iters=1), CPU, 0)
    clock.add(1.0, 1)
    assert clock.metrics(Progress(1, 2), RESULT, 1e-3).eta_s == 0.0


def test_memory_on_the_cpu_is_the_process_resident_peak():
    before = peak_memory_bytes(CPU)
    held = torch.ones(2**26)  # 256 MiB of float32
    assert peak_memory_bytes(CPU) >= held.nbytes
    assert peak_memory_bytes(CPU) >= before
