"""Trains a SentencePiece tokenizer on your text, for a model that starts from nothing."""

from __future__ import annotations

import math
from pathlib import Path

from megatron.cli import ArgumentParser, run_main
from megatron.data.documents import check_inputs, read_texts
from megatron.errors import ConfigError
from megatron.tokenizer.train import train_sentencepiece


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers} cannot do any work; give 1 or more threads.")
    if not 0 < options.max_text_mb < math.inf:
        raise ConfigError(f"--max_text_mb {options.max_text_mb:g} is not a size of text; give a positive number of MB.")
    output = Path(options.output)
    model_file = output if output.suffix == ".model" else output / "tokenizer.model"
    inputs = [Path(name) for name in options.input]
    check_inputs(inputs)
    report = train_sentencepiece(
        read_texts(inputs, options.json_key),
        model_file,
        vocab_size=options.vocab_size,
        model_type=options.model_type,
        max_text_bytes=int(options.max_text_mb * 1e6),
        num_threads=options.workers,
    )
    print(f"wrote {model_file}: {report.vocab_size:,} pieces ({options.model_type}), bos 1, eos 2, unknown 0")
    used = f"{report.text_bytes / 1e6:.2f} MB of text in {report.num_documents:,} documents"
    print(f"trained on {used}; {report.bytes_per_token:.2f} bytes of it make a token")
    print(f"sample:    {report.sample}")
    print(f"segmented: {' '.join(report.sample_pieces)}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON lines, or .txt files (UTF-8), to learn from"
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="a folder, which gets tokenizer.model, or a name ending in .model",
    )
    parser.add_argument("--vocab_size", type=int, default=32_000, help="number of pieces, 259 basic ones included")
    parser.add_argument("--model_type", choices=("bpe", "unigram"), default="bpe", help="algorithm")
    parser.add_argument("--json_key", default="text", help="key of JSON lines that holds text")
    parser.add_argument(
        "--max_text_mb", type=float, default=1000.0, help="MB of text to learn from; the rest is left out"
    )
    parser.add_argument("--workers", type=int, default=1, help="threads")
    return parser


if __name__ == "__main__":
    run_main(main)
