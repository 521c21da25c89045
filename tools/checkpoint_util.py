"""Rewrites a checkpoint, or a Hugging Face model, with one file for each rank of a target layout.

Training loads any checkpoint on any layout without this step. It is for merging a checkpoint into one file, for
splitting one so that each rank finds its own file, and for changing the number of vocabulary rows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.reshard import Resharding, check_room, has_optimizer_state, plan_resharding, reshard
from megatron.checkpoint.source import Source
from megatron.checkpoint.vocabulary import ResizedVocabulary
from megatron.cli import ArgumentParser, run_main
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError, ConfigError

MODEL_TYPES = ("llama", "llama2", "codellama", "llama3", "gpt", "falcon", "mistral", "bert")
FORMATS = ("megatron",)


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    layout = _layout(options)
    source = open_source(Path(options.load_dir), options.load_iters)
    _check_model_type(source, options.model_type)
    _print_source(source)
    if options.true_vocab_size is not None:
        source = _resize(source, options.true_vocab_size)
    keeps_masters = options.bf16 and has_optimizer_state(source)
    if keeps_masters:
        print("--bf16: the weights stay as they are, because they are the master weights of the optimizer state")
    plan = plan_resharding(source, layout, weights_dtype=torch.bfloat16 if options.bf16 and not keeps_masters else None)
    check_room(plan, Path(options.save_dir))
    start = time.monotonic()
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="written", dynamic_ncols=True) as progress:
        folder = reshard(plan, Path(options.save_dir), on_bytes=progress.update)
    _print_result(plan, layout, folder, time.monotonic() - start)


def _layout(options: argparse.Namespace) -> ParallelLayout:
    for flag in ("target_tensor_parallel_size", "target_pipeline_parallel_size"):
        if getattr(options, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(options, flag)} is not a positive number; use 1 or more.")
    if options.true_vocab_size is not None and options.true_vocab_size < 1:
        raise ConfigError(f"--true_vocab_size {options.true_vocab_size} is not a positive number; use 1 or more.")
    return ParallelLayout(tp=options.target_tensor_parallel_size, pp=options.target_pipeline_parallel_size)


def _check_model_type(source: Source, model_type: str | None) -> None:
    recorded = source.model_name()
    if recorded is not None and model_type is not None and recorded != model_type:
        raise CheckpointError(
            f"--model_type {model_type}: {source.path} holds a {recorded}; give --model_type {recorded} or none."
        )


def _resize(source: Source, vocab_size: int) -> Source:
    before = source.model_config().vocab_size
    if vocab_size == before:
        print(f"the vocabulary has {before} rows already")
        return source
    if vocab_size < before:
        print(f"cutting the vocabulary from {before} to {vocab_size} rows: tokens from {vocab_size} on are lost")
    else:
        print(f"growing the vocabulary from {before} to {vocab_size} rows: each new one is the mean of the old ones")
    return ResizedVocabulary(source, vocab_size)


def _print_source(source: Source) -> None:
    state = source.state()
    what = "weights only" if not has_optimizer_state(source) else "weights and optimizer state"
    kind = f"iteration {state.iteration}" if state is not None else "a Hugging Face model"
    print(f"reading {source.path}: {kind}, {what}, {len(source.names())} tensors")


def _print_result(plan: Resharding, layout: ParallelLayout, folder: Path, seconds: float) -> None:
    size, rate = (tqdm.format_sizeof(number, "B") for number in (plan.num_bytes, plan.num_bytes / seconds))
    files = f"{len(plan.files)} file(s) for TP{layout.tp} PP{layout.pp} and {MANIFEST_FILE}"
    print(f"wrote {folder}: {files}, {size} in {seconds:.1f} s ({rate}/s)")
    print(f"it holds: {', '.join(plan.kinds)}")


def _parser() -> ArgumentParser:
    no_queue = "is not needed: tensors are streamed from file to file."
    parser = ArgumentParser(
        description=__doc__,
        refused={
            "max_queue_size": no_queue,
            "megatron_path": "is not needed: this program imports its own package.",
            "no_checking": "does not exist: checkpoints are always checked.",
        },
    )
    parser.add_argument("--load_dir", required=True, metavar="DIR", help="a run's folder or a Hugging Face model")
    parser.add_argument("--load_iters", type=int, metavar="N", help="iteration to read; default: the latest")
    parser.add_argument("--save_dir", required=True, metavar="DIR", help="folder that gets the checkpoint")
    parser.add_argument(
        "--target_tensor_parallel_size", type=int, default=1, metavar="TP", help="tensor-parallel size to write for"
    )
    parser.add_argument(
        "--target_pipeline_parallel_size", type=int, default=1, metavar="PP", help="pipeline-parallel size to write for"
    )
    parser.add_argument(
        "--model_type", choices=MODEL_TYPES, help="compared with the model that the checkpoint says it holds"
    )
    parser.add_argument(
        "--true_vocab_size",
        type=int,
        metavar="N",
        help="number of vocabulary rows to write: others are cut, new ones are the mean of the old; default: as many",
    )
    parser.add_argument(
        "--bf16", action="store_true", help="write the weights in bfloat16, unless optimizer state comes with them"
    )
    parser.add_argument("--loader", choices=FORMATS, default="megatron", help="format to read, if not Hugging Face")
    parser.add_argument("--saver", choices=FORMATS, default="megatron", help="format to write")
    return parser


if __name__ == "__main__":
    run_main(main)
