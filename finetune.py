"""Pretrain, continue or finetune a language model: ``torchrun --nproc_per_node N finetune.py ...``, or one process.

The data-parallel size is what the number of processes leaves after ``--tensor_model_parallel_size`` and
``--pipeline_model_parallel_size``. ``--help`` lists every flag; ``--config run.yaml`` reads them from a file.
"""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.opening import is_checkpoint, open_source
from megatron.checkpoint.source import Source
from megatron.checkpoint.tokenizer_source import check_tokenizer
from megatron.cli import run_and_leave
from megatron.config import TypedFlags, checkpoint_arguments, parse_run, resolve, resolve_tokenizer
from megatron.core.topology import launch_environment
from megatron.tokenizer import build_tokenizer, fit_to_vocabulary
from megatron.training.logging import configure_logging
from megatron.training.run import train


def main(argv: list[str]) -> None:
    typed = parse_run(argv)
    launch = launch_environment()
    configure_logging(launch)
    source = open_load(typed)
    takes_arguments = typed.section("checkpoint").get("use_checkpoint_args", False)
    arguments = checkpoint_arguments(source) if source is not None and takes_arguments else None
    tokenizer_config = resolve_tokenizer(typed, arguments)
    if source is None:
        tokenizer = build_tokenizer(tokenizer_config)
        vocab_size = tokenizer.vocab_size
    else:
        vocab_size = source.model_config().vocab_size
        tokenizer = fit_to_vocabulary(tokenizer_config, vocab_size)
        is_named = any(typed.section("tokenizer").get(name) for name in ("tokenizer_model", "vocab_file"))
        check_tokenizer(source, tokenizer, tokenizer_config.path, is_named=is_named)
    run = resolve(typed, launch.world_size, checkpoint=arguments, tokenizer_vocab_size=vocab_size)
    train(run, tokenizer, source)


def open_load(typed: TypedFlags) -> Source | None:
    """What --load names. A run that saves where it loads from starts anew while there is nothing to continue."""
    flags = typed.section("checkpoint")
    load, save, iteration = flags.get("load"), flags.get("save"), flags.get("load_iters")
    if not isinstance(load, str):
        return None
    if isinstance(save, str) and Path(save) == Path(load) and iteration is None and _holds_nothing(Path(load)):
        return None
    return open_source(Path(load), iteration if isinstance(iteration, int) else None)


def _holds_nothing(folder: Path) -> bool:
    """No checkpoint of any kind, and no trace of one: where a run has lost its own, it must not begin anew unasked."""
    return not any(folder.glob("iter_*")) and not is_checkpoint(folder)


if __name__ == "__main__":
    run_and_leave(main)
