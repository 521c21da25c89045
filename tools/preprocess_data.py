"""Text to a tokenized dataset: JSON lines or plain text in, <output_prefix>_<key>_document.bin and .idx out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from megatron.cli import ArgumentParser, run_main
from megatron.cli.flags import Owner, add_flags, typed_fields
from megatron.data.preprocess import preprocess_files
from megatron.data.progress_bar import ProgressBar
from megatron.errors import ConfigError
from megatron.tokenizer import TokenizerConfig, build_tokenizer

NO_SENTENCES = "is not available: documents are kept whole, as generative training wants them; drop it."
REFUSED: Mapping[str, str] = dict.fromkeys(("split_sentences", "keep_newlines", "lang"), NO_SENTENCES)
TOKENIZER = Owner("tokenizer", "tokenizer", TokenizerConfig)


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.dataset_impl != "mmap":
        raise ConfigError(
            f"--dataset_impl {options.dataset_impl} is not written any more; drop the flag to write mmap."
        )
    if options.log_interval < 1:
        raise ConfigError(f"--log_interval {options.log_interval} is not a number of documents; give 1 or more.")
    if len(set(options.json_keys)) != len(options.json_keys):
        raise ConfigError(f"--json_keys {' '.join(options.json_keys)} names a key twice; name every key once.")
    tokenizer = build_tokenizer(TokenizerConfig(**typed_fields(options, TOKENIZER)))  # type: ignore[arg-type]
    prefixes = {key: Path(f"{options.output_prefix}_{key}_document") for key in options.json_keys}

    bar = ProgressBar(sys.stderr, log_interval=options.log_interval)
    try:
        result = preprocess_files(
            [Path(name) for name in options.input],
            prefixes,
            tokenizer,
            append_eod=options.append_eod,
            workers=options.workers,
            chunk_size=options.chunk_size,
            report=bar,
        )
    finally:
        bar.close()

    for prefix in prefixes.values():
        print(f"wrote {prefix}.bin and .idx")
    print(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids")
    print(f"documents: {result.num_documents:,}, and {result.num_dropped:,} empty ones dropped")
    print(f"tokens:    {result.num_tokens:,}, at most {result.longest_tokens:,} in a document")
    print(f"input:     {result.total_bytes / 1e6:.2f} MB at {result.total_bytes / 1e6 / bar.elapsed_s:.2f} MB/s")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__, refused=REFUSED)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines, one object per line; a .txt file is cut into documents at two or more blank lines",
    )
    parser.add_argument("--output_prefix", required=True, metavar="PATH", help="start of the names of the output files")
    parser.add_argument("--json_keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text")
    parser.add_argument("--append_eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=1, help="threads that tokenize; the output is the same for any")
    parser.add_argument("--chunk_size", type=int, default=256, help="most documents a thread takes at a time")
    parser.add_argument(
        "--log_interval", type=int, default=10_000, help="documents between lines where no bar is shown"
    )
    parser.add_argument("--dataset_impl", default="mmap", help="format of the output: only mmap")
    add_flags(parser, TOKENIZER)
    return parser


if __name__ == "__main__":
    run_main(main)
