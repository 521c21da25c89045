"""Convert published weights to the native format: a Hugging Face model, or Meta's own files.

    python weights_conversion/hf_to_megatron.py llama2 --size=7 --out=/path/to/megatron/weights/
    python weights_conversion/hf_to_megatron.py llama2 --out=OUT --model-path=FOLDER_OR_HUB_NAME
    python weights_conversion/hf_to_megatron.py llama2 --size=7 --out=OUT --cache-dir=FOLDER_WITH_consolidated.00.pth

Any layout loads the result; `finetune.py --load` also takes the folders themselves as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from megatron.checkpoint.dtypes import WEIGHT_DTYPES
from megatron.checkpoint.hf_config import architecture_differences
from megatron.checkpoint.importing import import_weights
from megatron.checkpoint.meta import SHARD_PATTERN, MetaSource
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.source import Source
from megatron.cli import ArgumentParser, run_main, warn
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig
from megatron.model.presets import MODEL_NAMES, family_defaults, hub_name, model_sizes, preset

# What a number of parameters consists of. The rest may differ in a model that somebody trained further.
SIZE_FIELDS = frozenset(
    {
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_attention_heads_kv",
        "kv_channels",
        "ffn_hidden_size",
    }
)
# What all models of a family have in common.
FAMILY_FIELDS = ("use_rms_norm", "glu_activation", "position_embedding_type", "qk_layernorm", "scale_embeddings")
TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
# Other programs' copies of the same weights, and folders with other formats.
IGNORED_FILES = ("*/*", "consolidated*")


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if args.size is None and args.model_path is None and not _holds_meta(args.cache_dir):
        raise ConfigError(
            f"nothing says which {args.model} to convert; give --model-path, or --size with one of "
            f"{', '.join(model_sizes(args.model))}."
        )
    expected = None if args.size is None else preset(args.model, args.size)
    origin = _origin(args)
    source = _open(origin, args)
    _check_family(source, args.model)
    if expected is not None:
        _check_size(source, expected, f"{args.model} --size {args.size}")
    dtype = None if args.dtype is None else WEIGHT_DTYPES[args.dtype]
    num_bytes = sum(math.prod(source.shape(n)) * (dtype or source.dtype(n)).itemsize for n in source.names())
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=f"{origin} -> {args.out}") as progress:
        folder = import_weights(source, args.out, model_name=args.model, dtype=dtype, on_bytes=progress.update)
    print(f"wrote {folder}: {len(source.names())} tensors, {tqdm.format_sizeof(num_bytes, 'B')}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in MODEL_NAMES if model_sizes(name)]
    parser.add_argument("model", choices=names, help="family of models")
    parser.add_argument(
        "--size", help="published size of the family, as 70 or 3.1-8; checked against --model-path where both are given"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument(
        "--model_path",
        help="local folder (Hugging Face or Meta) or name on the Hugging Face hub; default: as published",
    )
    parser.add_argument(
        "--cache_dir",
        type=Path,
        help="where downloads are kept, default: the hub client's cache; or a folder of Meta's with "
        "consolidated.00.pth, which is then converted",
    )
    parser.add_argument("--dtype", choices=list(WEIGHT_DTYPES), help="dtype of the weights; default: as they are")
    parser.add_argument("--bf16", dest="dtype", action="store_const", const="bf16", help="the same as --dtype bf16")
    return parser


def _holds_meta(folder: Path | None) -> bool:
    return folder is not None and any(folder.glob(SHARD_PATTERN))


def _origin(args: argparse.Namespace) -> str:
    """A folder, or a name on the hub."""
    if args.model_path is not None:
        return args.model_path
    return str(args.cache_dir) if _holds_meta(args.cache_dir) else hub_name(args.model, args.size)


def _open(origin: str, args: argparse.Namespace) -> Source:
    folder = _model_folder(origin, args.cache_dir)
    source = open_source(folder)
    if isinstance(source, MetaSource):
        # Its files leave open what its family says.
        return MetaSource(folder, family=args.model)
    if source.state() is not None:
        raise ConfigError(
            f"{folder} is a checkpoint of a run already; load it as it is, or rewrite it with tools/checkpoint_util.py."
        )
    return source


def _model_folder(model_path: str, cache_dir: Path | None) -> Path:
    """The folder itself if there is one, else the download of that name (kept, and resumed where it was cut off)."""
    if Path(model_path).is_dir():
        return Path(model_path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_path):
        raise CheckpointError(
            f"--model-path {model_path} is neither a folder nor a name on the Hugging Face hub; check the spelling."
        )
    try:
        folder = _download(model_path, cache_dir, "*.safetensors")
        # Pickled weights are fetched where there are no others.
        return folder if any(folder.glob("*.safetensors")) else _download(model_path, cache_dir, "pytorch_model*.bin")
    except (HfHubHTTPError, OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"--model-path {model_path} is no folder here and could not be downloaded ({cause}); check the name, the "
            "network and `hf auth login`, or give the folder of a copy."
        ) from error


def _download(name: str, cache_dir: Path | None, weights: str) -> Path:
    return Path(
        snapshot_download(
            name, cache_dir=cache_dir, allow_patterns=[weights, *TEXT_FILES], ignore_patterns=list(IGNORED_FILES)
        )
    )


def _check_family(source: Source, model_name: str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    model, family = source.model_config(), {**defaults, **family_defaults(model_name)}
    wrong = [
        f"{name} is {getattr(model, name)}, there {family[name]}"
        for name in FAMILY_FIELDS
        if getattr(model, name) != family[name]
    ]
    if wrong:
        raise ConfigError(f"{source.path} is no {model_name}: {'; '.join(wrong)}. Name the family that it belongs to.")


def _check_size(source: Source, expected: ModelConfig, asked_for: str) -> None:
    differences = architecture_differences(source.model_config(), expected, ignored=("init_method_std",))
    listed = {name: f"{name} is {ours}, there {theirs}" for name, (ours, theirs) in differences.items()}
    if sizes := [text for name, text in listed.items() if name in SIZE_FIELDS]:
        raise ConfigError(f"{source.path} is not {asked_for}: {'; '.join(sizes)}. Drop --size or correct it.")
    if listed:
        warn(f"{source.path} differs from the published {asked_for}: {'; '.join(listed.values())}")


if __name__ == "__main__":
    run_main(main)
