"""Convert a Hugging Face model to the native format.

    python weights_conversion/hf_to_megatron.py llama2 --size=7 --out=/path/to/megatron/weights/
    python weights_conversion/hf_to_megatron.py llama2 --out=OUT --model-path=FOLDER_OR_HUB_NAME

Any layout loads the result; `finetune.py --load` also takes a Hugging Face folder as it is.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from tqdm import tqdm

from megatron.checkpoint.dtypes import WEIGHT_DTYPES
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.hf_config import architecture_differences
from megatron.checkpoint.hf_import import import_hf_folder
from megatron.cli import ArgumentParser, run_main, warn
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig
from megatron.model.presets import MODEL_NAMES, hub_name, model_sizes, preset

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
FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if args.size is None and args.model_path is None:
        raise ConfigError(
            f"nothing says which {args.model} to convert; give --model-path, or --size with one of "
            f"{', '.join(model_sizes(args.model))}."
        )
    expected = None if args.size is None else preset(args.model, args.size)
    source = HuggingFaceSource(_model_folder(args.model_path or hub_name(args.model, args.size), args.cache_dir))
    if expected is not None:
        _check_size(source, expected, f"{args.model} --size {args.size}")
    dtype = None if args.dtype is None else WEIGHT_DTYPES[args.dtype]
    num_bytes = sum(math.prod(source.shape(n)) * (dtype or source.dtype(n)).itemsize for n in source.names())
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=f"{source.path.name} -> {args.out}") as progress:
        folder = import_hf_folder(source, args.out, model_name=args.model, dtype=dtype, on_bytes=progress.update)
    print(f"wrote {folder}: {len(source.names())} tensors, {tqdm.format_sizeof(num_bytes, 'B')}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in MODEL_NAMES if model_sizes(name)]
    parser.add_argument("model", choices=names, help="family of models")
    parser.add_argument("--size", help="published size in billions; checked against --model_path where both are given")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--model_path", help="local folder or name on the Hugging Face hub; default: as published")
    parser.add_argument("--cache_dir", type=Path, help="where downloads are kept; default: the hub client's cache")
    parser.add_argument("--dtype", choices=list(WEIGHT_DTYPES), help="dtype of the weights; default: as they are")
    parser.add_argument("--bf16", dest="dtype", action="store_const", const="bf16", help="the same as --dtype bf16")
    return parser


def _model_folder(model_path: str, cache_dir: Path | None) -> Path:
    """The folder itself if there is one, else the download of that name (kept, and resumed where it was cut off)."""
    if Path(model_path).is_dir():
        return Path(model_path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_path):
        raise CheckpointError(
            f"--model-path {model_path} is neither a folder nor a name on the Hugging Face hub; check the spelling."
        )
    try:
        return Path(
            snapshot_download(model_path, cache_dir=cache_dir, allow_patterns=list(FILES), ignore_patterns="*/*")
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"--model-path {model_path} is no folder here and could not be downloaded ({cause}); check the name, the "
            "network and `hf auth login`, or give the folder of a copy."
        ) from error


def _check_size(source: HuggingFaceSource, expected: ModelConfig, asked_for: str) -> None:
    differences = architecture_differences(source.model_config(), expected, ignored=("init_method_std",))
    listed = {name: f"{name} is {ours}, there {theirs}" for name, (ours, theirs) in differences.items()}
    if sizes := [text for name, text in listed.items() if name in SIZE_FIELDS]:
        raise ConfigError(f"{source.path} is not {asked_for}: {'; '.join(sizes)}. Drop --size or correct it.")
    if listed:
        warn(f"{source.path} differs from the published {asked_for}: {'; '.join(listed.values())}")


if __name__ == "__main__":
    run_main(main)
