"""Convert a checkpoint of any layout or format to a folder that transformers and vLLM load.

    python weights_conversion/megatron_to_hf.py --input_dir /path/to/megatron/weights/ --output_dir /path/to/hf/

The padding of the vocabulary and the optimizer stay behind; dtypes are kept unless asked for. Tokens that were added
for training are in the tokenizer that is written, with the ids they had.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from megatron.checkpoint.dtypes import WEIGHT_DTYPES
from megatron.checkpoint.hf import CONFIG_FILE, GENERATION_FILE, carried_files
from megatron.checkpoint.hf_export import (
    DEFAULT_SHARD_BYTES,
    Export,
    check_output_folder,
    plan_export,
    split_by_number,
    split_by_size,
    write_hf_folder,
)
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.source import Source
from megatron.checkpoint.tokenizer_export import ExportedTokenizer, export_tokenizer
from megatron.checkpoint.tokenizer_files import SENTENCEPIECE_FILE, TOKENIZER_FOLDER, tokenizer_files
from megatron.checkpoint.tokenizer_roles import parse_overrides
from megatron.cli import ArgumentParser, run_main, warn
from megatron.errors import ConfigError
from megatron.model.presets import MODEL_NAMES
from megatron.tokenizer.config import TokenizerConfig
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

UNITS: Mapping[str, int] = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ADDITIONS = ("vocab_extra_ids", "vocab_extra_ids_list", "no_new_tokens")


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    overrides = parse_overrides(args.override_special_tokens)
    check_output_folder(args.output_dir)
    source = open_source(args.input_dir, args.load_iters)
    _check_model_name(source, args.model)
    with TemporaryDirectory() as scratch:
        tokenizer = _tokenizer(source, args, overrides, Path(scratch))
        export = _plan(source, tokenizer, None if args.dtype is None else WEIGHT_DTYPES[args.dtype])
        _warn_of_qwen(export, tokenizer)
        if args.num_output_shards is not None:
            shards = split_by_number(export.tensors, args.num_output_shards)
        else:
            shards = split_by_size(export.tensors, args.max_shard_size)
        description = f"{source.path} -> {args.output_dir}"
        with tqdm(total=export.num_bytes, unit="B", unit_scale=True, desc=description) as progress:
            write_hf_folder(
                source, export, shards, args.output_dir, other_files=tokenizer.files, on_bytes=progress.update
            )
    size = tqdm.format_sizeof(export.num_bytes, "B")
    print(f"wrote {args.output_dir}: {len(export.tensors)} tensors, {size} in {len(shards)} file(s)")
    if tokenizer.tokenizer is not None:
        added = tokenizer.tokenizer.added_tokens
        print(f"tokenizer: {tokenizer.tokenizer.vocab_size:,} ids, {len(added)} of them added: {', '.join(added)}")


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
    parser.add_argument("--dtype", choices=list(WEIGHT_DTYPES), help="dtype of the weights; default: as they are")
    parser.add_argument("--model", choices=MODEL_NAMES, help="family of models; checked against the checkpoint")
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


def _num_bytes(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    if size is None or float(size[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give 5GB or 500MB, say")
    return int(float(size[1]) * UNITS.get(size[2], 1))


def _check_model_name(source: Source, asked_for: str | None) -> None:
    recorded = source.model_name()
    if asked_for is not None and recorded is not None and asked_for != recorded:
        raise ConfigError(f"--model {asked_for}: {source.path} holds a {recorded} model; drop --model or correct it.")


def _tokenizer(
    source: Source, args: argparse.Namespace, overrides: Mapping[str, str], scratch: Path
) -> ExportedTokenizer:
    config = _tokenizer_config(source, args)
    if config is not None:
        exported = export_tokenizer(config, source.model_config().vocab_size, scratch, overrides)
        if exported.differing_text is not None:
            warn(
                f"{config.path}: transformers cuts some texts otherwise, {exported.differing_text!r} for example; "
                "added tokens have their ids. Use tokenizer.model where every id has to agree."
            )
        return exported
    if overrides:
        raise ConfigError(
            f"--override_special_tokens: {source.path} names no tokenizer that is still there; "
            "give it with --vocab_file."
        )
    warn(f"{source.path} names no tokenizer that is still there; give one with --vocab_file to have it copied.")
    return ExportedTokenizer({})


def _tokenizer_config(source: Source, args: argparse.Namespace) -> TokenizerConfig | None:
    """What the checkpoint was trained with, under what was typed; None if no tokenizer is there."""
    recorded = _recorded_tokenizer(source)
    typed = {name: getattr(args, name) for name in ADDITIONS if hasattr(args, name)}
    if isinstance(extra := typed.get("vocab_extra_ids_list"), str):
        typed["vocab_extra_ids_list"] = (extra,)
    if recorded is None and not typed:
        # Weights that were only converted: their tokenizer is what its files say.
        typed["no_new_tokens"] = True
    kept = {name: value for name, value in (recorded or {}).items() if name in (*ADDITIONS, "tokenizer_type")}
    if args.vocab_file is not None:
        tokenizer_files(Path(args.vocab_file))
        return TokenizerConfig(**{**kept, "tokenizer_type": None, "tokenizer_model": args.vocab_file, **typed})
    path = _tokenizer_path(source, recorded or {})
    return None if path is None else TokenizerConfig(**{**kept, "tokenizer_model": str(path), **typed})


def _recorded_tokenizer(source: Source) -> dict[str, Any] | None:
    """The fields of the run's TokenizerConfig; None for weights that no run has saved."""
    state = source.state()
    section = None if state is None else state.config.get("tokenizer")
    if not isinstance(section, Mapping):
        return None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}


def _tokenizer_path(source: Source, recorded: Mapping[str, Any]) -> Path | None:
    """Where the tokenizer is that the checkpoint names, or its copy beside the checkpoint."""
    identity = source.tokenizer()
    named = recorded.get("tokenizer_model") or recorded.get("vocab_file") or (identity and identity.tokenizer_model)
    if named and Path(named).exists():
        return Path(named)
    for folder in (source.path / TOKENIZER_FOLDER, source.path.parent / TOKENIZER_FOLDER):
        if named and named.endswith(".model") and (folder / SENTENCEPIECE_FILE).is_file():
            return folder / SENTENCEPIECE_FILE
        if folder.is_dir():
            return folder
    return None


def _plan(source: Source, tokenizer: ExportedTokenizer, dtype: torch.dtype | None) -> Export:
    """The export, with the ids of special tokens: all of them for a model born here, else those asked for."""
    carried = carried_files(source)
    export = plan_export(source, dtype=dtype, special_tokens=None if "hf_config" in carried else tokenizer.ids())
    files = {name: dict(content) for name, content in export.json_files.items()}
    if "hf_config" not in carried and len(stop_ids := tokenizer.stop_ids()) > 1:
        # Pre-training documents ended with <EOD>, answers end with eos.
        files[GENERATION_FILE] = {**tokenizer.ids(), "eos_token_id": stop_ids}
    for name in files.keys() & {CONFIG_FILE, GENERATION_FILE}:
        files[name] |= tokenizer.overridden
    return replace(export, json_files=files)


def _warn_of_qwen(export: Export, tokenizer: ExportedTokenizer) -> None:
    is_sentencepiece = isinstance(tokenizer.tokenizer, SentencePieceTokenizer)
    if is_sentencepiece and export.json_files[CONFIG_FILE]["model_type"] == "qwen2":
        warn(
            "AutoTokenizer takes every tokenizer of a qwen2 model for Qwen's own, and this is SentencePiece; load it "
            "with PreTrainedTokenizerFast.from_pretrained."
        )


if __name__ == "__main__":
    run_main(main)
