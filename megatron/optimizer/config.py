"""Which optimizer, and how the learning rate runs over the iterations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule and its schedule. `lr_decay_iters` and `lr_warmup_iters` count optimizer steps.

    In a resolved run `lr_decay_iters` is never None, and `lr_warmup_fraction` has become `lr_warmup_iters`.
    """

    optimizer: Literal["adam", "sgd"] = field(
        default="adam", metadata={"help": "adam (AdamW: decoupled weight decay) or sgd with momentum"}
    )
    lr: float = field(metadata={"help": "highest learning rate; required"})
    min_lr: float = field(default=0.0, metadata={"help": "learning rate at the end of the decay"})
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = field(
        default="linear", metadata={"help": "how the learning rate falls after the warm-up"}
    )
    lr_decay_iters: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "iteration at which min_lr is reached; default: train_iters"},
    )
    lr_warmup_iters: int = field(default=0, metadata={"help": "iterations over which the learning rate rises from 0"})
    lr_warmup_fraction: float | None = field(
        default=None, metadata={"help": "warm-up as a share of lr_decay_iters; instead of lr_warmup_iters"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "decay of weights; biases and norms have none"})
    adam_beta1: float = field(default=0.9, metadata={"help": "Adam: decay of the mean of gradients"})
    adam_beta2: float = field(default=0.999, metadata={"help": "Adam: decay of the mean of squared gradients"})
    adam_eps: float = field(default=1e-8, metadata={"help": "Adam: added to the root of the mean square"})
    sgd_momentum: float = field(default=0.9, metadata={"help": "SGD: momentum"})
    clip_grad: float = field(
        default=1.0, metadata={"help": "norm to which larger gradients of the whole model are scaled down; 0: never"}
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for values that no run can use."""
        self._check_rates()
        self._check_warmup()
        for flag, beta in (
            ("--adam_beta1", self.adam_beta1),
            ("--adam_beta2", self.adam_beta2),
            ("--sgd_momentum", self.sgd_momentum),
        ):
            if not 0 <= beta < 1:
                raise ConfigError(
                    f"{flag} {beta} is not in [0, 1); a running mean forgets a part of the past: 0.9, say."
                )
        if not self.adam_eps > 0:
            raise ConfigError(f"--adam_eps {self.adam_eps} is not positive: it keeps a division finite; use 1e-8, say.")
        for flag, value in (("--weight_decay", self.weight_decay), ("--clip_grad", self.clip_grad)):
            if not value >= 0:
                raise ConfigError(f"{flag} {value} is negative; use 0 to switch it off.")

    def _check_rates(self) -> None:
        if not 0 <= self.lr < float("inf"):
            raise ConfigError(f"--lr {self.lr} is not a learning rate: it is 0 or more; use 3e-4, say.")
        if not self.min_lr >= 0:
            raise ConfigError(f"--min_lr {self.min_lr} is negative; use 0 or more.")
        if self.min_lr > self.lr:
            raise ConfigError(
                f"--min_lr {self.min_lr} is above --lr {self.lr}, where the decay begins; lower --min_lr."
            )

    def _check_warmup(self) -> None:
        if self.lr_decay_iters is not None and self.lr_decay_iters < 1:
            raise ConfigError(
                f"--lr_decay_iters {self.lr_decay_iters} leaves no iteration to decay over; use 1 or more, or leave it "
                "out for --train_iters."
            )
        if self.lr_warmup_iters < 0:
            raise ConfigError(f"--lr_warmup_iters {self.lr_warmup_iters} is negative; use 0 for no warm-up.")
        if self.lr_warmup_fraction is not None:
            if not 0 <= self.lr_warmup_fraction < 1:
                raise ConfigError(
                    f"--lr_warmup_fraction {self.lr_warmup_fraction} is not in [0, 1): it is a share of "
                    "--lr_decay_iters; use 0.1, say."
                )
            if self.lr_warmup_iters:
                raise ConfigError(
                    f"--lr_warmup_fraction {self.lr_warmup_fraction} and --lr_warmup_iters {self.lr_warmup_iters} both "
                    "set the warm-up; give one of them."
                )
        if self.lr_decay_iters is not None and self.lr_warmup_iters >= self.lr_decay_iters:
            raise ConfigError(
                f"--lr_warmup_iters {self.lr_warmup_iters} leaves none of the {self.lr_decay_iters} iterations "
                "(--lr_decay_iters, by default --train_iters) to decay over; shorten the warm-up."
            )
