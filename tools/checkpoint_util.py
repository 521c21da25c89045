"""Rewrites checkpoints for another layout or format, and looks into them.

    python tools/checkpoint_util.py --load_dir IN --save_dir OUT --target_tensor_parallel_size 4
    python tools/checkpoint_util.py verify DIR      every checksum; status 1 where something is damaged
    python tools/checkpoint_util.py show DIR        configuration, files and tensors
    python tools/checkpoint_util.py diff ONE OTHER  what they differ in; status 1 where they do

Training loads any checkpoint on any layout without this program. It is for merging a checkpoint into one file, for
splitting one so that each rank finds its own file, for changing the number of vocabulary rows, and for other formats.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console
from tqdm import tqdm

from megatron.checkpoint.conversion import SAVERS, Conversion, Target
from megatron.checkpoint.diff import compare, is_weights_only
from megatron.checkpoint.opening import FORMATS, format_of, open_megatron_legacy, open_source
from megatron.checkpoint.reshard import has_optimizer_state
from megatron.checkpoint.show import format_bytes, overview
from megatron.checkpoint.source import MODEL, Source, num_entry_bytes
from megatron.checkpoint.state_dict_source import open_dcp, open_torch_file
from megatron.checkpoint.verify import (
    folders_to_verify,
    stored_bytes,
    verify_iteration,
    verify_source,
    verify_tracker,
)
from megatron.checkpoint.vocabulary import ResizedVocabulary
from megatron.cli import ArgumentParser, run_main
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError, ConfigError
from megatron.model.presets import MODEL_NAMES, family_defaults

MODEL_TYPES = tuple(dict.fromkeys((*MODEL_NAMES, "bert")))
LOADERS: Sequence[str] = ("auto", *(known.name for known in FORMATS))
# What weights of another family cannot agree in, whatever somebody changed in training.
STRUCTURE = ("use_rms_norm", "glu_activation", "position_embedding_type", "qk_layernorm", "scale_embeddings")
PIPE_COLUMNS = 200
# Each worker holds some 50 MiB, and two are as quick as most disks.
MAX_WORKERS = 2


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    for flag in ("target_tensor_parallel_size", "target_pipeline_parallel_size", "true_vocab_size", "num_workers"):
        size = getattr(options, flag, None)
        if size is not None and size < 1:
            raise ConfigError(f"--{flag} {size} is not a positive number; use 1 or more.")
    # The workers are what runs in parallel; threads inside a copy would only wait for each other.
    torch.set_num_threads(1)
    options.run(options)


def _convert(options: argparse.Namespace) -> None:
    target = _target(options)
    source = _open_to_convert(options)
    _check_model_type(source, options.model_type)
    _print_source(source)
    if options.true_vocab_size is not None:
        source = _resize(source, options.true_vocab_size)
    if options.bf16 and options.saver == "megatron" and has_optimizer_state(source):
        print("--bf16: the weights stay as they are, because they are the master weights of the optimizer state")
        target = dataclasses.replace(target, dtype=None)
    conversion = SAVERS[options.saver](source, target)
    if options.dry_run:
        _print_plan(conversion, target.root)
        return
    start = time.monotonic()
    with _progress(conversion.num_tensor_bytes, "written") as on_bytes:
        folder = conversion.write(on_bytes)
    seconds = time.monotonic() - start
    size, rate = (
        format_bytes(round(number)) for number in (conversion.num_tensor_bytes, conversion.num_tensor_bytes / seconds)
    )
    print(f"wrote {folder}: {len(conversion.files)} file(s), {size} in {seconds:.1f} s ({rate}/s)")
    print(f"it holds {conversion.contents}")


def _target(options: argparse.Namespace) -> Target:
    return Target(
        root=Path(options.save_dir),
        layout=ParallelLayout(tp=options.target_tensor_parallel_size, pp=options.target_pipeline_parallel_size),
        layers_per_virtual_stage=options.target_num_layers_per_virtual_pipeline_stage,
        dtype=torch.bfloat16 if options.bf16 else None,
        model_name=options.model_type,
        num_workers=options.num_workers,
    )


def _open_to_convert(options: argparse.Namespace) -> Source:
    folder, loader, iteration = options.load_dir, options.loader, options.load_iters
    if not options.rotary_halves:
        return _open(folder, loader=loader, iteration=iteration, config=options.config)
    if loader != "megatron_legacy":
        raise ConfigError("--rotary_halves is about trees of Megatron-LLM; give --loader megatron_legacy with it.")
    return open_megatron_legacy(Path(folder), iteration, rotary_halves=True)


def _open(folder: str, *, loader: str = "auto", iteration: int | None = None, config: Path | None = None) -> Source:
    path = Path(folder)
    known = next((known for known in FORMATS if known.name == loader), None)
    if known is not None and not known.recognises(path):
        raise CheckpointError(f"--loader {loader}: {path} is not {known.looks_like}; give another loader or none.")
    if config is None:
        return open_source(path, iteration) if known is None else known.open(path, iteration)
    found = known or format_of(path)
    if found is not None and found.name == "dcp":
        return open_dcp(path, iteration, config=config)
    if found is not None and found.name == "torch":
        return open_torch_file(path, config=config)
    raise ConfigError(f"--config {config}: {path} describes its model itself, or is no checkpoint; drop --config.")


def _check_model_type(source: Source, model_type: str | None) -> None:
    recorded = source.model_name()
    if model_type is None or model_type == recorded:
        return
    if recorded is not None:
        raise CheckpointError(
            f"--model_type {model_type}: {source.path} holds a {recorded}; give --model_type {recorded} or none."
        )
    model, expected = source.model_config(), family_defaults(model_type) if model_type in MODEL_NAMES else {}
    wrong = [
        f"{name} is {getattr(model, name)}, there {expected[name]}"
        for name in STRUCTURE
        if name in expected and getattr(model, name) != expected[name]
    ]
    if wrong:
        raise CheckpointError(
            f"--model_type {model_type}: {source.path} holds another family: {'; '.join(wrong)}. Correct it or drop it."
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
    kind = f"iteration {state.iteration}" if state is not None else "no checkpoint of a run"
    print(f"reading {source.path}: {kind}, {what}, {len(source.names())} tensors")


def _print_plan(conversion: Conversion, root: Path) -> None:
    print(f"would write {conversion.contents}")
    for name, num_bytes in conversion.files.items():
        print(f"  {name}  {num_bytes:,} bytes")
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    needed, free = sum(conversion.files.values()), shutil.disk_usage(existing).free
    verdict = "enough" if free >= needed else "NOT enough"
    print(f"{len(conversion.files)} file(s), {needed:,} bytes; {existing} has {free:,} bytes free, which is {verdict}")
    print("nothing was written (--dry_run)")


def _verify(options: argparse.Namespace) -> None:
    path = Path(options.dir)
    known = format_of(path)
    if known is not None and known.name == "megatron":
        folders = folders_to_verify(path, options.load_iters, every=options.all)
        with _progress(sum(map(stored_bytes, folders)), "verified") as on_bytes:
            findings = [verify_iteration(f, num_workers=options.num_workers, on_bytes=on_bytes) for f in folders]
        if path not in folders:
            findings.append(verify_tracker(path))
    else:
        source = open_source(path, options.load_iters)
        print(f"{source.path} is of a format without checksums: every tensor is read, and must be there whole")
        with _progress(sum(map(partial(num_entry_bytes, source), source.names())), "read") as on_bytes:
            findings = [verify_source(source, on_bytes=on_bytes)]
    for found in findings:
        print("\n".join(found.lines()))
    if any(found.damage for found in findings):
        sys.exit(1)


def _show(options: argparse.Namespace) -> None:
    source = _open(options.dir, iteration=options.load_iters, config=options.config)
    # A pipe has no width: what goes to grep is not to be broken.
    Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False).print(overview(source))


def _diff(options: argparse.Namespace) -> None:
    one, other = _open(options.one), _open(options.other)
    weights_only = options.weights_only or is_weights_only(one) or is_weights_only(other)
    if weights_only and not options.weights_only:
        print("one of them is weights only: what a run has besides is not compared")
    names = [name for name in one.names() if not weights_only or name.startswith(f"{MODEL}.")]
    with _progress(sum(num_entry_bytes(one, name) for name in names), "compared") as on_bytes:
        found = compare(one, other, weights_only=weights_only, num_workers=options.num_workers, on_bytes=on_bytes)
    print("\n".join(found.lines(one.path, other.path)))
    if not found.is_empty:
        sys.exit(1)


@contextmanager
def _progress(num_bytes: int, what: str) -> Iterator[Callable[[int], object]]:
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=what, dynamic_ncols=True) as bar:
        yield bar.update


class _Parser(ArgumentParser):
    """A command line whose first word may be a command with flags of its own; without one it converts."""

    commands: Mapping[str, ArgumentParser] = MappingProxyType({})

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        typed = list(sys.argv[1:] if args is None else args)
        if typed and typed[0] in self.commands:
            return self.commands[typed[0]].parse_args(typed[1:], namespace)
        return super().parse_args(typed, namespace)


def _parser() -> ArgumentParser:
    no_queue = "is not needed: tensors are streamed from file to file."
    parser = _Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        refused={
            "max_queue_size": no_queue,
            "megatron_path": "is not needed: this program imports its own package.",
            "no_checking": "does not exist: checkpoints are always checked.",
        },
    )
    parser.commands = {"verify": _verify_parser(), "show": _show_parser(), "diff": _diff_parser()}
    parser.set_defaults(run=_convert)
    _add_source_flags(parser.add_argument_group("what is read"))
    _add_target_flags(parser.add_argument_group("what is written"))
    parser.add_argument("--dry_run", action="store_true", help="print what would be written, and write nothing")
    _add_workers(parser, "files are shared out to so many threads; what they hold does not depend on it")
    return parser


def _add_source_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--load_dir", required=True, metavar="DIR", help="a run's folder, or weights of another format")
    group.add_argument("--load_iters", type=int, metavar="N", help="iteration to read; default: the latest")
    group.add_argument("--loader", choices=LOADERS, default="auto", help="format to read; default: what the folder is")
    _add_config(group)
    group.add_argument(
        "--rotary_halves",
        action="store_true",
        help="with --loader megatron_legacy: a tree from before Megatron-LLM's permute_qkv.py, queries and keys as in "
        "Hugging Face",
    )
    group.add_argument(
        "--model_type", choices=MODEL_TYPES, help="compared with what the source holds; recorded if it does not say"
    )


def _add_target_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save_dir", required=True, metavar="DIR", help="folder that gets the checkpoint")
    group.add_argument("--saver", choices=list(SAVERS), default="megatron", help="format to write; default: megatron")
    group.add_argument(
        "--target_tensor_parallel_size", type=int, default=1, metavar="TP", help="tensor-parallel size to write for"
    )
    group.add_argument(
        "--target_pipeline_parallel_size", type=int, default=1, metavar="PP", help="pipeline-parallel size to write for"
    )
    group.add_argument(
        "--target_num_layers_per_virtual_pipeline_stage",
        type=int,
        metavar="L",
        help="layers of a stage where each pipeline rank has several (interleaved schedule)",
    )
    group.add_argument(
        "--true_vocab_size",
        type=int,
        metavar="N",
        help="number of vocabulary rows to write: others are cut, new ones are the mean of the old; default: as many",
    )
    group.add_argument(
        "--bf16", action="store_true", help="write the weights in bfloat16, unless optimizer state comes with them"
    )


def _verify_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="checkpoint_util.py verify",
        description="Reads every byte and names all that is damaged. Status 0: nothing is, 1: something, 2: an error.",
    )
    parser.set_defaults(run=_verify)
    parser.add_argument("dir", metavar="DIR", help="a run's folder, one iteration's, or weights of another format")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--load_iters", type=int, metavar="N", help="iteration to verify; default: the latest")
    which.add_argument("--all", action="store_true", help="verify all iterations of a run")
    _add_workers(parser, "files are read by so many threads")
    return parser


def _show_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="checkpoint_util.py show",
        description="Shows the configuration, the files and the tensors of a checkpoint.",
    )
    parser.set_defaults(run=_show)
    parser.add_argument("dir", metavar="DIR", help="a run's folder, one iteration's, or weights of another format")
    parser.add_argument("--load_iters", type=int, metavar="N", help="iteration to show; default: the latest")
    _add_config(parser)
    return parser


def _diff_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="checkpoint_util.py diff",
        description="Compares two checkpoints of any format and layout. Status 0: equal, 1: different, 2: an error.",
    )
    parser.set_defaults(run=_diff)
    parser.add_argument("one", metavar="ONE", help="a run's folder, one iteration's, or weights of another format")
    parser.add_argument("other", metavar="OTHER", help="what it is compared with")
    parser.add_argument("--weights_only", action="store_true", help="leave optimizer and state of the run out")
    _add_workers(parser, "tensors are compared by so many threads")
    return parser


def _add_config(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="config.json, params.json or its folder, for weights that do not say what model they are of",
    )


def _add_workers(parser: argparse.ArgumentParser, what: str) -> None:
    default = min(MAX_WORKERS, os.cpu_count() or 1)
    parser.add_argument("--num_workers", type=int, default=default, metavar="N", help=f"{what}; default: %(default)s")


if __name__ == "__main__":
    run_main(main)
