"""Text to a tokenized dataset: JSON lines, .txt or parquet in, <output_prefix>_<key>_document.bin and .idx out."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron.cli import ArgumentParser, run_main
from megatron.cli.flags import Owner, add_flags, typed_fields
from megatron.data.inputs import find_inputs
from megatron.data.preprocess import Listeners, Progress, preprocess_files
from megatron.data.preprocess_config import PreprocessConfig
from megatron.data.progress_bar import BadLines, ProgressBar
from megatron.errors import ConfigError
from megatron.tokenizer import TokenizerConfig, build_tokenizer

TOKENIZER = Owner("tokenizer", "tokenizer", TokenizerConfig)
DOCUMENTS = Owner("preprocess", "documents", PreprocessConfig)
# What a shell gives a command that ended by SIGINT.
INTERRUPTED_STATUS = 130


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.dataset_impl != "mmap":
        raise ConfigError(
            f"--dataset_impl {options.dataset_impl} is not written any more; drop the flag to write mmap."
        )
    if options.log_interval < 1:
        raise ConfigError(f"--log_interval {options.log_interval} is not a number of documents; give 1 or more.")
    keys = options.json_keys or ["text"]
    if len(set(keys)) != len(keys):
        raise ConfigError(f"--json_keys {' '.join(keys)} names a key twice; name every key once.")
    config = PreprocessConfig(**typed_fields(options, DOCUMENTS))  # type: ignore[arg-type]
    inputs = find_inputs(options.input)
    tokenizer = build_tokenizer(TokenizerConfig(**typed_fields(options, TOKENIZER)))  # type: ignore[arg-type]
    prefixes = {key: Path(f"{options.output_prefix}_{key}_{config.level}") for key in keys}

    bar = ProgressBar(sys.stderr, log_interval=options.log_interval)
    backends: list[str] = []
    tell = Listeners(progress=bar, bad=BadLines(bar), backend=backends.append)
    try:
        result = preprocess_files(inputs, prefixes, tokenizer, config, tell=tell)
    except KeyboardInterrupt:  # what is kept, and how to go on, has been said
        raise SystemExit(INTERRUPTED_STATUS) from None
    finally:
        bar.close()

    for prefix in prefixes.values():
        print(f"wrote {prefix}.bin and .idx")
    print(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids")
    _print_counts(result)
    through = f" with {backends[-1]}" if backends[-1] else ""
    done = bar.own.num_text_bytes / 1e6
    print(f"text:      {done:.2f} MB at {done / bar.elapsed_s:.2f} MB/s{through}")


def _print_counts(result: Progress) -> None:
    print(f"documents: {result.num_documents:,}, and {result.num_dropped:,} empty ones dropped")
    if result.num_bad:
        print(f"bad lines: {result.num_bad:,} skipped")
    print(f"tokens:    {result.num_tokens:,}, at most {result.longest_tokens:,} in a document")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or globs: JSON lines, one object per line; .txt, cut into documents at two or more blank lines; "
        "both also .gz, .zst, .bz2, .xz; .parquet",
    )
    parser.add_argument("--output_prefix", required=True, metavar="PATH", help="start of the names of the output files")
    parser.add_argument("--json_keys", nargs="+", metavar="KEY", help="keys, or columns, that hold text; default: text")
    parser.add_argument(
        "--log_interval", type=int, default=10_000, help="documents between lines where no bar is shown"
    )
    parser.add_argument("--dataset_impl", default="mmap", help="format of the output: only mmap")
    add_flags(parser, DOCUMENTS)
    add_flags(parser, TOKENIZER)
    return parser


if __name__ == "__main__":
    run_main(main)
