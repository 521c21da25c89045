"""Convert a checkpoint of any layout to a folder that transformers loads.

    python weights_conversion/megatron_to_hf.py --input_dir /path/to/megatron/weights/ --output_dir /path/to/hf/

The padding of the vocabulary and the optimizer stay behind; dtypes are kept unless asked for.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from megatron.checkpoint.dtypes import WEIGHT_DTYPES
from megatron.checkpoint.hf import carried_files
from megatron.checkpoint.hf_export import (
    DEFAULT_SHARD_BYTES,
    check_output_folder,
    plan_export,
    split_by_number,
    split_by_size,
    write_hf_folder,
)
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.source import Source
from megatron.checkpoint.tokenizer_files import TOKENIZER_FOLDER, added_config, tokenizer_files
from megatron.cli import ArgumentParser, run_main, warn
from megatron.errors import ConfigError
from megatron.model.presets import MODEL_NAMES
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.config import TokenizerConfig

UNITS: Mapping[str, int] = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    check_output_folder(args.output_dir)
    source = open_source(args.input_dir, args.load_iters)
    _check_model_name(source, args.model)
    tokenizer = _tokenizer_files(source, args.input_dir, args.vocab_file)
    dtype: torch.dtype | None = None if args.dtype is None else WEIGHT_DTYPES[args.dtype]
    special_tokens = None if "hf_config" in carried_files(source) else _special_tokens(tokenizer)
    export = plan_export(source, dtype=dtype, special_tokens=special_tokens)
    export = replace(export, json_files={**export.json_files, **added_config(tokenizer)})
    if args.num_output_shards is not None:
        shards = split_by_number(export.tensors, args.num_output_shards)
    else:
        shards = split_by_size(export.tensors, args.max_shard_size)
    with tqdm(
        total=export.num_bytes, unit="B", unit_scale=True, desc=f"{source.path} -> {args.output_dir}"
    ) as progress:
        write_hf_folder(source, export, shards, args.output_dir, other_files=tokenizer, on_bytes=progress.update)
    size = tqdm.format_sizeof(export.num_bytes, "B")
    print(f"wrote {args.output_dir}: {len(export.tensors)} tensors, {size} in {len(shards)} file(s)")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="folder of checkpoints, or of one iteration")
    parser.add_argument("--load_iters", type=int, help="iteration to convert; default: the latest")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, new or empty")
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument("--num_output_shards", type=int, help="number of weight files; default: by --max_shard_size")
    shards.add_argument(
        "--max_shard_size", type=_num_bytes, default=DEFAULT_SHARD_BYTES, help="size of a weight file; default: 5GB"
    )
    parser.add_argument("--dtype", choices=list(WEIGHT_DTYPES), help="dtype of the weights; default: as they are")
    parser.add_argument("--model", choices=MODEL_NAMES, help="family of models; checked against the checkpoint")
    parser.add_argument("--vocab_file", type=Path, help="tokenizer to copy; default: the one the checkpoint names")
    return parser


def _num_bytes(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    if size is None or float(size[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 5GB or 500MB, say")
    return int(float(size[1]) * UNITS.get(size[2], 1))


def _check_model_name(source: Source, asked_for: str | None) -> None:
    recorded = source.model_name()
    if asked_for is not None and recorded is not None and asked_for != recorded:
        raise ConfigError(f"--model {asked_for}: {source.path} holds a {recorded} model; drop --model or correct it.")


def _tokenizer_files(source: Source, input_dir: Path, vocab_file: Path | None) -> Mapping[str, Path]:
    """The tokenizer that was asked for, that the checkpoint names, or that lies beside it: in this order."""
    if vocab_file is not None:
        return tokenizer_files(vocab_file)
    recorded = source.tokenizer()
    candidates = [input_dir / TOKENIZER_FOLDER, source.path.parent / TOKENIZER_FOLDER]
    if recorded is not None:
        candidates.insert(0, Path(recorded.tokenizer_model))
    for path in candidates:
        if path.exists():
            return tokenizer_files(path)
    warn(f"{source.path} names no tokenizer that is still there; give one with --vocab_file to have it copied.")
    return {}


def _special_tokens(tokenizer: Mapping[str, Path]) -> dict[str, int]:
    main = tokenizer.get("tokenizer.json") or tokenizer.get("tokenizer.model")
    if main is None:
        return {}
    built = build_tokenizer(TokenizerConfig(tokenizer_model=str(main), no_new_tokens=True))
    ids = {"bos_token_id": built.bos, "eos_token_id": built.eos, "pad_token_id": built.pad}
    return {key: token for key, token in ids.items() if token is not None}


if __name__ == "__main__":
    run_main(main)
