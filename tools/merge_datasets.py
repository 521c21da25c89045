"""Merges the tokenized datasets of a folder into one, sorted by name."""

from __future__ import annotations

import time
from pathlib import Path

from tqdm import tqdm

from megatron.cli import ArgumentParser, run_main
from megatron.data.indexed import strip_suffix
from megatron.data.merge import find_prefixes, merge, open_all
from megatron.errors import ConfigError


def main(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    output = strip_suffix(options.output_prefix)
    prefixes = find_prefixes(Path(options.input))
    if any(_files(output) & _files(prefix) for prefix in prefixes):
        raise ConfigError(
            f"--output_prefix {output} is one of the datasets in {options.input}; choose a name that is not."
        )
    datasets = open_all(prefixes)
    start = time.monotonic()
    num_bytes = sum(indexed.num_tokens * indexed.dtype.itemsize for indexed in datasets)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="merged", dynamic_ncols=True) as progress:
        merged = merge(datasets, output, on_bytes=progress.update)
    for indexed in datasets:
        print(f"{indexed.prefix}: {indexed.num_documents:,} documents, {indexed.num_tokens:,} tokens")
    seconds = time.monotonic() - start
    print(
        f"wrote {output}.bin and .idx: {len(datasets)} datasets, {merged.num_documents:,} documents, "
        f"{merged.num_tokens:,} tokens ({merged.dtype.name}) in {seconds:.1f} s"
    )


def _files(prefix: Path) -> set[Path]:
    """The files of a dataset, by the only names that go through no link."""
    return {Path(f"{prefix}{suffix}").resolve() for suffix in (".bin", ".idx")}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, metavar="DIR", help="folder of .bin and .idx files; all are merged")
    parser.add_argument(
        "--output_prefix", required=True, metavar="PREFIX", help="the merged dataset, without .bin or .idx"
    )
    return parser


if __name__ == "__main__":
    run_main(main)
