"""Convert a checkpoint of any layout or format to a folder that transformers and vLLM load.

    python weights_conversion/megatron_to_hf.py --input_dir /path/to/megatron/weights/ --output_dir /path/to/hf/

The padding of the vocabulary and the optimizer stay behind; dtypes are kept unless asked for. Tokens that were added
for training are in the tokenizer that is written, with the ids they had.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from megatron.checkpoint.dtypes import WEIGHT_DTYPES
from megatron.checkpoint.hf import CONFIG_FILE
from megatron.checkpoint.hf_config import hf_config
from megatron.checkpoint.hf_export import (
    DEFAULT_SHARD_BYTES,
    check_output_folder,
    split_by_number,
    split_by_size,
    write_hf_folder,
)
from megatron.checkpoint.model_export import ModelExport, plan_model_export
from megatron.checkpoint.opening import open_megatron_legacy, open_source
from megatron.checkpoint.source import Source
from megatron.checkpoint.tokenizer_roles import parse_overrides
from megatron.checkpoint.tokenizer_source import ADDITIONS, tokenizer_of
from megatron.cli import ArgumentParser, run_main, warn
from megatron.errors import ConfigError
from megatron.model.presets import MODEL_NAMES, model_sizes, preset
from megatron.tokenizer.protocol import Tokenizer

UNITS: Mapping[str, int] = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    overrides = parse_overrides(args.override_special_tokens)
    check_output_folder(args.output_dir)
    source = _open(args)
    _check_model_name(source, args.model)
    tokenizer = tokenizer_of(source, path=args.vocab_file, additions=_additions(args))
    if tokenizer is None:
        _tell_of_no_tokenizer(source, overrides)
    dtype = None if args.dtype is None else WEIGHT_DTYPES[args.dtype]
    with TemporaryDirectory() as scratch:
        planned = plan_model_export(source, tokenizer, Path(scratch), dtype=dtype, overrides=overrides)
        _check_family(source, planned, args.model)
        for message in planned.warnings():
            warn(message)
        _write(source, planned, args)
    if planned.tokenizer.tokenizer is not None:
        _print_tokenizer(planned.tokenizer.tokenizer)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input_dir", type=Path, required=True, help="a run's folder, one iteration's, or weights of another format"
    )
    parser.add_argument("--load_iters", type=int, help="iteration to convert; default: the latest")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, new or empty")
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument("--num_output_shards", type=int, help="number of weight files; default: by --max_shard_size")
    shards.add_argument(
        "--max_shard_size", type=_num_bytes, default=DEFAULT_SHARD_BYTES, help="size of a weight file; default: 5GB"
    )
    parser.add_argument(
        "--dtype",
        choices=list(WEIGHT_DTYPES),
        help="dtype of the weights; default: as they are, and bf16 for a run trained with --bf16",
    )
    parser.add_argument("--model", choices=MODEL_NAMES, help="family of models; checked against the checkpoint")
    parser.add_argument(
        "--rotary_halves",
        action="store_true",
        help="the input is a tree of Megatron-LLM from before its permute_qkv.py: queries and keys as in Hugging Face",
    )
    parser.add_argument("--cache_dir", type=Path, help="not needed: nothing is downloaded for an export")
    _add_tokenizer_flags(
        parser.add_argument_group("tokenizer; by default the one that the checkpoint was trained with")
    )
    return parser


def _add_tokenizer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--vocab_file", help="tokenizer.model, tokenizer.json or a folder with one of them")
    unset: Any = argparse.SUPPRESS
    group.add_argument("--vocab_extra_ids", type=int, default=unset, help="number of <extra_id_i> tokens trained with")
    group.add_argument("--vocab_extra_ids_list", default=unset, help="comma-separated tokens that were added")
    group.add_argument(
        "--no_new_tokens", action="store_true", default=unset, help="trained without <CLS>, <SEP>, <EOD>, <MASK>, <PAD>"
    )
    group.add_argument(
        "--override_special_tokens",
        nargs="+",
        default=[],
        metavar="ROLE=TOKEN",
        help='give bos, cls, eos, mask, pad, sep or unk another token: eos="<|im_end|>" pad="<PAD>"',
    )


def _open(args: argparse.Namespace) -> Source:
    if args.rotary_halves:
        return open_megatron_legacy(args.input_dir, args.load_iters, rotary_halves=True)
    return open_source(args.input_dir, args.load_iters)


def _num_bytes(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    if size is None or float(size[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 5GB or 500MB, say")
    return int(float(size[1]) * UNITS.get(size[2], 1))


def _check_model_name(source: Source, asked_for: str | None) -> None:
    recorded = source.model_name()
    if asked_for is not None and recorded is not None and asked_for != recorded:
        raise ConfigError(f"--model {asked_for}: {source.path} holds a {recorded} model; drop --model or correct it.")


def _check_family(source: Source, planned: ModelExport, asked_for: str | None) -> None:
    """Not every format records a name. What `asked_for` was published as is the family of all its sizes."""
    sizes = () if asked_for is None else model_sizes(asked_for)
    if asked_for is None or not sizes:
        return
    expected = hf_config(preset(asked_for, sizes[0]), model_name=asked_for)["model_type"]
    if (written := planned.weights.json_files[CONFIG_FILE]["model_type"]) != expected:
        raise ConfigError(f"--model {asked_for}: {source.path} holds a {written} model; drop --model or correct it.")


def _additions(args: argparse.Namespace) -> dict[str, Any]:
    typed = {name: getattr(args, name) for name in ADDITIONS if hasattr(args, name)}
    if "vocab_extra_ids_list" in typed:
        typed["vocab_extra_ids_list"] = (typed["vocab_extra_ids_list"],)
    return typed


def _tell_of_no_tokenizer(source: Source, overrides: Mapping[str, str]) -> None:
    nowhere = f"{source.path} names no tokenizer that is still there"
    if overrides:
        raise ConfigError(f"--override_special_tokens: {nowhere}; give it with --vocab_file.")
    warn(f"{nowhere}; give one with --vocab_file to have it copied.")


def _write(source: Source, planned: ModelExport, args: argparse.Namespace) -> None:
    weights, folder = planned.weights, args.output_dir
    if args.num_output_shards is not None:
        shards = split_by_number(weights.tensors, args.num_output_shards)
    else:
        shards = split_by_size(weights.tensors, args.max_shard_size)
    with tqdm(total=weights.num_bytes, unit="B", unit_scale=True, desc=f"{source.path} -> {folder}") as progress:
        write_hf_folder(source, weights, shards, folder, other_files=planned.tokenizer.files, on_bytes=progress.update)
    size = tqdm.format_sizeof(weights.num_bytes, "B")
    print(f"wrote {folder}: {len(weights.tensors)} tensors, {size} in {len(shards)} file(s)")


def _print_tokenizer(tokenizer: Tokenizer) -> None:
    added = f", {len(names)} of them added: {', '.join(names)}" if (names := tokenizer.added_tokens) else ""
    print(f"tokenizer: {tokenizer.vocab_size:,} ids{added}")


if __name__ == "__main__":
    run_main(main)
