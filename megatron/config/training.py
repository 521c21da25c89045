"""What a run trains for how long on which device, where it keeps its state, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron.errors import ConfigError
from megatron.model.presets import MODEL_NAMES

_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Model family, batches, iterations, precision and device. In a resolved run `global_batch_size` is never None."""

    model_name: str = field(
        default="gpt", metadata={"help": "family of models, whose architecture it sets", "choices": MODEL_NAMES}
    )
    size: str | None = field(
        default=None,
        metadata={"help": "published size of the family: 70 for --model_name llama2, 3.1-8 for llama3, base for bert"},
    )
    micro_batch_size: int = field(metadata={"help": "samples that pass through the model at once; required"})
    global_batch_size: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "samples of one optimizer step; default: micro_batch_size x data-parallel size"},
    )
    train_iters: int = field(metadata={"help": "optimizer steps of the whole run; required"})
    make_vocab_size_divisible_by: int = field(
        default=128, metadata={"help": "vocabulary rows per tensor rank are padded to a multiple of this"}
    )
    seed: int = field(default=1234, metadata={"help": "decides initial weights, sample order and dropout"})
    bf16: bool = field(
        default=False, metadata={"help": "compute in bfloat16 with fp32 weights and gradient sums; default: fp32"}
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto: cuda where there is one"})
    deterministic: bool = field(default=False, metadata={"help": "only kernels that give the same bits every time"})
    compile: bool = field(default=False, metadata={"help": "compile what lies between the matmuls"})
    use_flash_attn: bool = field(
        default=False, metadata={"help": "flash-attn for attention, where installed; default: PyTorch's own kernels"}
    )
    eval_interval: int = field(default=1000, metadata={"help": "iterations between evaluations"})
    eval_iters: int = field(default=100, metadata={"help": "global batches of one evaluation; 0: never evaluate"})
    exit_interval: int | None = field(
        default=None, metadata={"help": "save and leave at the next iteration that is a multiple of this"}
    )
    exit_signal_handler: bool = field(
        default=False, metadata={"help": "no effect: SIGTERM always saves and leaves (accepted for old scripts)"}
    )
    distributed_timeout_minutes: float = field(
        default=10.0, metadata={"help": "how long a process waits for the others before it gives up"}
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for values that no run can use."""
        for flag, number, least in (
            ("--micro_batch_size", self.micro_batch_size, 1),
            ("--global_batch_size", self.global_batch_size, 1),
            ("--train_iters", self.train_iters, 1),
            ("--make_vocab_size_divisible_by", self.make_vocab_size_divisible_by, 1),
            ("--seed", self.seed, 0),
            ("--eval_interval", self.eval_interval, 1),
            ("--eval_iters", self.eval_iters, 0),
            ("--exit_interval", self.exit_interval, 1),
        ):
            if number is not None and number < least:
                raise ConfigError(f"{flag} {number} is too small; use {least} or more.")
        if self.seed > _LARGEST_SEED:
            raise ConfigError(
                f"--seed {self.seed} is too large for NumPy's generators, which shuffle the data; use 0 to "
                f"{_LARGEST_SEED}."
            )
        if not self.distributed_timeout_minutes > 0:
            raise ConfigError(
                f"--distributed_timeout_minutes {self.distributed_timeout_minutes} is no time to wait; use 10, say."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where the run's state comes from and where it goes."""

    save: str | None = field(
        default=None,
        metadata={
            "metavar": "PATH",
            "help": "folder for checkpoints, metrics and config; also saves at the end of the run",
        },
    )
    save_interval: int | None = field(
        default=None, metadata={"help": "iterations between checkpoints; default: end only"}
    )
    async_save: bool = field(
        default=False,
        metadata={
            "help": "copy what is saved to host memory and write it while training goes on; "
            "default: training waits for the disk"
        },
    )
    keep_last: int | None = field(
        default=None,
        metadata={"help": "after a save remove what is older than this many valid checkpoints; default: keep all"},
    )
    save_optim: bool = field(default=True, metadata={"help": "write the optimizer's state into checkpoints"})
    load: str | None = field(
        default=None,
        metadata={
            "metavar": "PATH",
            "help": "what to start from: a run's folder, one iteration in it, or a model in any known format",
        },
    )
    load_iters: int | None = field(
        default=None,
        metadata={"help": "iteration to load, which must be whole; default: the latest one that is"},
    )
    load_optim: bool = field(default=True, metadata={"help": "load the optimizer's state"})
    finetune: bool = field(default=False, metadata={"help": "load weights only and count iterations from 0"})
    use_checkpoint_args: bool = field(
        default=False, metadata={"help": "take architecture, sequence length and tokenizer from the checkpoint"}
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for an option without the folder it is about."""
        for flag, value, least, folder_flag, folder in (
            ("--save_interval", self.save_interval, 1, "--save", self.save),
            ("--keep_last", self.keep_last, 1, "--save", self.save),
            ("--load_iters", self.load_iters, 0, "--load", self.load),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{flag} {value} is too small; use {least} or more.")
            if value is not None and folder is None:
                raise ConfigError(f"{flag} {value} has no folder; give {folder_flag} PATH, or drop {flag}.")
        if self.async_save and self.save is None:
            raise ConfigError("--async_save has no folder; give --save PATH, or drop --async_save.")
        for flag, is_on in (("--use_checkpoint_args", self.use_checkpoint_args), ("--finetune", self.finetune)):
            if is_on and self.load is None:
                raise ConfigError(f"{flag} has no checkpoint to read; give --load PATH, or drop {flag}.")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What the run says of itself."""

    log_interval: int = field(default=1, metadata={"help": "iterations between log lines"})
    tensorboard_dir: str | None = field(
        default=None, metadata={"metavar": "PATH", "help": "folder for TensorBoard; default: none is written"}
    )

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise ConfigError(f"--log_interval {self.log_interval} is too small; use 1 or more.")
