"""Several tokenized datasets -> one, in the order of their names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.data.indexed import IndexedDataset, strip_suffix
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import DataError


def find_prefixes(folder: Path) -> list[Path]:
    """The datasets in `folder`, sorted by name. Raises DataError for half a pair, and where there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder; give the one that holds the .bin and .idx files to merge.")
    halves = {suffix: {path.stem for path in folder.glob(f"*{suffix}")} for suffix in (".bin", ".idx")}
    if unpaired := sorted(halves[".bin"] ^ halves[".idx"]):
        found, missing = (".bin", ".idx") if unpaired[0] in halves[".bin"] else (".idx", ".bin")
        raise DataError(
            f"{folder / unpaired[0]}{found}: has no {missing} beside it; complete the dataset or move the file away."
        )
    if not halves[".bin"]:
        raise DataError(f"{folder}: holds no .bin and .idx files; give the folder of the datasets to merge.")
    return [folder / name for name in sorted(halves[".bin"])]


def open_all(prefixes: Sequence[Path]) -> list[IndexedDataset]:
    """Opens what is to be merged. Raises DataError for a damaged one, and where the dtypes differ."""
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    first = datasets[0]
    for other in datasets[1:]:
        if other.dtype != first.dtype:
            raise DataError(
                f"{first.prefix} holds {first.dtype.name} and {other.prefix} {other.dtype.name}; datasets of one "
                "tokenizer have one dtype: tokenize the text again, or merge them apart."
            )
        if (len(other.document_indices) == 1) != (len(first.document_indices) == 1) and len(first) and len(other):
            bare, full = (other, first) if len(other.document_indices) == 1 else (first, other)
            raise DataError(
                f"{full.prefix} has a document index and {bare.prefix} has none, as instruction data; merge them apart."
            )
    return datasets


def merge(
    datasets: Sequence[IndexedDataset], prefix: str | os.PathLike[str], *, on_bytes: Callable[[int], object]
) -> IndexedDataset:
    """Writes `datasets` one after another under `prefix`, byte for byte what Megatron-LM's merge gives."""
    _free_cache(Path(f"{strip_suffix(prefix)}.bin"))
    has_documents = any(len(indexed.document_indices) > 1 for indexed in datasets)
    with IndexedDatasetWriter(prefix, datasets[0].dtype, has_documents=has_documents) as writer:
        for indexed in datasets:
            writer.add_dataset(indexed, on_bytes)
    return IndexedDataset(prefix)


def _free_cache(replaced: Path) -> None:
    """The memory that caches a file which is about to be replaced serves the new one; the file itself stays as it is.

    Fresh memory can take several times as long to get as it takes to copy into it.
    """
    with contextlib.suppress(OSError), open(replaced, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
