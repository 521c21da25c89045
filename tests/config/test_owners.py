"""What each owner's dataclass refuses on its own."""

import pytest

from megatron.config import CheckpointConfig, LoggingConfig, ParallelConfig, TrainingConfig
from megatron.data.config import DataConfig
from megatron.errors import ConfigError
from megatron.optimizer.config import OptimizerConfig


def refusal(make, **values) -> str:
    with pytest.raises(ConfigError) as caught:
        make(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr": -1e-4}, "--lr -0.0001 is not a learning rate: it is 0 or more; use 3e-4, say."),
        ({"min_lr": -1.0}, "--min_lr -1.0 is negative; use 0 or more."),
        ({"min_lr": 1.0}, "--min_lr 1.0 is above --lr 0.001, where the decay begins; lower --min_lr."),
        ({"lr_warmup_iters": -1}, "--lr_warmup_iters -1 is negative; use 0 for no warm-up."),
        (
            {"lr_decay_iters": 0},
            "--lr_decay_iters 0 leaves no iteration to decay over; use 1 or more, or leave it out for --train_iters.",
        ),
        (
            {"lr_warmup_fraction": 1.0},
            "--lr_warmup_fraction 1.0 is not in [0, 1): it is a share of --lr_decay_iters; use 0.1, say.",
        ),
        (
            {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 5},
            "--lr_warmup_fraction 0.1 and --lr_warmup_iters 5 both set the warm-up; give one of them.",
        ),
        (
            {"adam_beta2": 1.0},
            "--adam_beta2 1.0 is not in [0, 1); a running mean forgets a part of the past: 0.9, say.",
        ),
        ({"adam_eps": 0.0}, "--adam_eps 0.0 is not positive: it keeps a division finite; use 1e-8, say."),
        ({"weight_decay": -0.1}, "--weight_decay -0.1 is negative; use 0 to switch it off."),
        ({"clip_grad": -1.0}, "--clip_grad -1.0 is negative; use 0 to switch it off."),
    ],
)
def test_optimizer_values_that_no_run_can_use(values, expected):
    assert refusal(OptimizerConfig, **{"lr": 1e-3, **values}) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"data_path": ("0.5", "a", "b")},
            (
                "--data_path 0.5 a b is neither paths nor weights and paths in turns; give --data_path PATH [PATH ...] "
                "or --data_path WEIGHT PATH [WEIGHT PATH ...]."
            ),
        ),
        (
            {"train_data_path": ("0", "a", "1", "b")},
            "--train_data_path 0 a 1 b: weight 0 is no share; give a positive number.",
        ),
        (
            {"train_data_path": ("a",), "valid_data_path": ("web=b", "c")},
            ("--valid_data_path web=b c: 'c' is no NAME=PATH with a name of its own; give every set a name, or none."),
        ),
        (
            {"train_data_path": ("a",), "valid_data_path": ("web=b", "web=c")},
            (
                "--valid_data_path web=b web=c: 'web' is no NAME=PATH with a name of its own; give every set a name, "
                "or none."
            ),
        ),
        (
            {"data_path": ("a",), "max_epochs_per_dataset": 0.0},
            "--max_epochs_per_dataset 0 reads nothing; use 1, say, or leave it out.",
        ),
        (
            {"data_path": ("a",), "valid_data_path": ("b",)},
            (
                "--data_path a is cut into training, validation and test by --split, so --valid_data_path "
                "cannot be given "
                "with it; use --data_path alone, or --train_data_path, --valid_data_path and --test_data_path."
            ),
        ),
        (
            {"valid_data_path": ("b",)},
            "--train_data_path is missing, and validation and test data have been given their own paths; add it.",
        ),
        ({"seq_length": 0}, "--seq_length 0 holds no token; use 1 or more."),
        ({"num_workers": -1}, "--num_workers -1 is negative; use 0 to read when needed."),
    ],
)
def test_data_that_contradicts_itself(values, expected):
    assert refusal(DataConfig, **values) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"micro_batch_size": 0}, "--micro_batch_size 0 is too small; use 1 or more."),
        ({"train_iters": 0}, "--train_iters 0 is too small; use 1 or more."),
        ({"global_batch_size": 0}, "--global_batch_size 0 is too small; use 1 or more."),
        ({"make_vocab_size_divisible_by": 0}, "--make_vocab_size_divisible_by 0 is too small; use 1 or more."),
        ({"seed": -1}, "--seed -1 is too small; use 0 or more."),
        (
            {"seed": 2**32},
            "--seed 4294967296 is too large for NumPy's generators, which shuffle the data; use 0 to 4294967295.",
        ),
        ({"eval_interval": 0}, "--eval_interval 0 is too small; use 1 or more."),
        ({"eval_iters": -1}, "--eval_iters -1 is too small; use 0 or more."),
        ({"exit_interval": 0}, "--exit_interval 0 is too small; use 1 or more."),
        (
            {"distributed_timeout_minutes": 0.0},
            "--distributed_timeout_minutes 0.0 is no time to wait; use 10, say.",
        ),
    ],
)
def test_training_values_that_no_run_can_use(values, expected):
    assert refusal(TrainingConfig, **{"micro_batch_size": 1, "train_iters": 1, **values}) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"save_interval": 5}, "--save_interval 5 has no folder; give --save PATH, or drop --save_interval."),
        ({"save": "x", "save_interval": 0}, "--save_interval 0 is too small; use 1 or more."),
        ({"keep_last": 2}, "--keep_last 2 has no folder; give --save PATH, or drop --keep_last."),
        ({"save": "x", "keep_last": 0}, "--keep_last 0 is too small; use 1 or more."),
        ({"async_save": True}, "--async_save has no folder; give --save PATH, or drop --async_save."),
        ({"load_iters": 5}, "--load_iters 5 has no folder; give --load PATH, or drop --load_iters."),
        ({"load": "x", "load_iters": -1}, "--load_iters -1 is too small; use 0 or more."),
        (
            {"use_checkpoint_args": True},
            "--use_checkpoint_args has no checkpoint to read; give --load PATH, or drop --use_checkpoint_args.",
        ),
        ({"finetune": True}, "--finetune has no checkpoint to read; give --load PATH, or drop --finetune."),
    ],
)
def test_an_option_about_a_folder_needs_the_folder(values, expected):
    assert refusal(CheckpointConfig, **values) == expected


@pytest.mark.parametrize(
    "name",
    [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "num_layers_per_virtual_pipeline_stage",
        "recompute_num_layers",
    ],
)
def test_parallel_sizes_are_positive(name):
    assert refusal(ParallelConfig, **{name: 0}) == f"--{name} 0 is not a positive number; use 1 or more."


def test_a_log_interval_is_positive():
    assert refusal(LoggingConfig, log_interval=0) == "--log_interval 0 is too small; use 1 or more."


def test_save_alone_is_enough():
    assert CheckpointConfig(save="x").save_interval is None
