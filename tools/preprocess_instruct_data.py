"""Conversations to instruction data: JSON lines in, <output_prefix>-text and <output_prefix>-role .bin and .idx out."""

from __future__ import annotations

import sys

from megatron.cli import ArgumentParser, run_main
from megatron.cli.flags import Owner, add_flags, typed_fields
from megatron.data.inputs import find_inputs
from megatron.data.instruct_preprocess import InstructConfig, preprocess_conversations
from megatron.data.preprocess import Listeners
from megatron.data.progress_bar import BadLines, ProgressBar
from megatron.errors import ConfigError
from megatron.tokenizer import TokenizerConfig

TOKENIZER = Owner("tokenizer", "tokenizer", TokenizerConfig)
CONVERSATIONS = Owner("instruct", "conversations", InstructConfig)


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.dataset_impl != "mmap":
        raise ConfigError(
            f"--dataset_impl {options.dataset_impl} is not written any more; drop the flag to write mmap."
        )
    if options.log_interval < 1:
        raise ConfigError(f"--log_interval {options.log_interval} is not a number of conversations; give 1 or more.")
    config = InstructConfig(**typed_fields(options, CONVERSATIONS))  # type: ignore[arg-type]
    tokenizer_config = TokenizerConfig(**typed_fields(options, TOKENIZER))  # type: ignore[arg-type]
    bar = ProgressBar(sys.stderr, log_interval=options.log_interval)
    try:
        result = preprocess_conversations(
            find_inputs(options.input),
            options.output_prefix,
            tokenizer_config,
            config,
            tell=Listeners(progress=bar, bad=BadLines(bar)),
        )
    finally:
        bar.close()
    print(f"wrote {options.output_prefix}-text and {options.output_prefix}-role, .bin and .idx each")
    print(f"conversations: {result.num_documents:,}")
    if result.num_bad:
        print(f"bad lines:     {result.num_bad:,} skipped")
    print(f"tokens:        {result.num_tokens:,}, at most {result.longest_tokens:,} in a conversation")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or globs of JSON lines, one conversation per line; also .gz, .zst, .bz2, .xz",
    )
    parser.add_argument("--output_prefix", required=True, metavar="PATH", help="start of the names of the output files")
    parser.add_argument(
        "--log_interval", type=int, default=10_000, help="conversations between lines where no bar is shown"
    )
    parser.add_argument("--dataset_impl", default="mmap", help="format of the output: only mmap")
    add_flags(parser, CONVERSATIONS)
    add_flags(parser, TOKENIZER)
    return parser


if __name__ == "__main__":
    run_main(main)
