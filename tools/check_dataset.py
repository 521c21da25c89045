"""Checks a tokenized dataset in full and names every fault. The exit status is 1 if there is one."""

from __future__ import annotations

import sys

from megatron.cli import ArgumentParser, run_main
from megatron.data.check import check_dataset
from megatron.data.indexed import IndexedDataset, name_of
from megatron.errors import ConfigError, DataError


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    if options.vocab_size is not None and options.vocab_size < 1:
        raise ConfigError(f"--vocab_size {options.vocab_size} is no vocabulary; give the number of ids.")
    num_faults = 0
    for prefix in options.prefix:
        findings = list(check_dataset(prefix, options.vocab_size))
        for finding in findings:
            print(f"{'FAULT  ' if finding.is_fault else 'warning'} {finding.text}")
        num_own = sum(finding.is_fault for finding in findings)
        num_faults += num_own
        counted = f"{num_own} fault{'s' if num_own > 1 else ''}"
        print(f"{prefix}: {counted if num_own else _sound(prefix, options.vocab_size)}")
    if num_faults:
        sys.exit(1)


def _sound(prefix: str, vocab_size: int | None) -> str:
    try:
        indexed = IndexedDataset(prefix)
    except DataError:
        indexed = IndexedDataset(f"{name_of(prefix)}-text")
    ids = "" if vocab_size is None else f", all ids below {vocab_size}"
    return f"sound: {indexed.num_documents:,} documents, {indexed.num_tokens:,} tokens ({indexed.dtype.name}){ids}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="dataset, without .bin or .idx (or -text, -role)")
    parser.add_argument("--vocab_size", type=int, metavar="N", help="ids have to be below this")
    return parser


if __name__ == "__main__":
    run_main(main)
