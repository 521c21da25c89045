"""The learning rate as a pure function of the iteration, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from megatron.optimizer.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, iteration: int) -> float:
    """The rate that iteration `iteration` updates with; the first update is iteration 1. It is also the rate to log.

    Warm-up rises linearly to `lr`, which iteration `lr_warmup_iters` reaches: the first update already moves,
    by ``lr / lr_warmup_iters``. Then the rate falls from `lr` to `min_lr`, which iteration `lr_decay_iters`
    reaches and later ones keep. "inverse-square-root" is ``lr * sqrt(lr_warmup_iters / iteration)``, never
    below `min_lr` and not stretched to end there (Vaswani et al. 2017, section 5.3); "constant" never falls.
    """
    warmup_iters = _warmup_iters(config)
    if iteration <= warmup_iters:
        return config.lr * iteration / warmup_iters
    if config.lr_decay_style == "constant":
        return config.lr
    if iteration >= config.lr_decay_iters:
        return config.min_lr
    if config.lr_decay_style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup_iters, 1) / iteration))
    progress = (iteration - warmup_iters) / (config.lr_decay_iters - warmup_iters)
    remaining = 1 - progress if config.lr_decay_style == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.lr - config.min_lr) * remaining


def _warmup_iters(config: OptimizerConfig) -> int:
    if config.lr_warmup_fraction is None:
        return config.lr_warmup_iters
    return int(config.lr_warmup_fraction * config.lr_decay_iters)
