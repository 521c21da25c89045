"""A run reads its data from an object store as it would from a disk, and finds its indices again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.tokenizer.null import NullTokenizer
from megatron.training.checkpointing import Progress
from megatron.training.datasets import RunDatasets, build_datasets
from object_server import serve_bucket
from small_run import small_run

VOCABULARY = 500


def write(prefix: Path, num_documents: int) -> Path:
    random = np.random.default_rng(num_documents)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in random.integers(1, 60, num_documents):
            writer.add_document(random.integers(0, VOCABULARY, length).astype(np.uint16))
    return prefix


def built(paths: list[str], folder: Path) -> RunDatasets:
    config = folder / "config.yaml"
    config.write_text(f"data:\n  data_path: {paths}\n")
    run = small_run(
        vocab_size=VOCABULARY, data_path=False, config=config, data_cache_path=folder / "cache", split="60,40",
        seq_length=16, train_iters=10, eval_iters=2, global_batch_size=4,
    )  # fmt: skip
    return build_datasets(run, NullTokenizer(VOCABULARY), Progress())


def tokens(datasets: RunDatasets) -> list[list[int]]:
    parts = (datasets.train, datasets.validation["validation"])
    return [part[k].tokens.tolist() for part, count in zip(parts, (40, 8), strict=True) for k in range(count)]


@pytest.mark.parametrize("template", [["{}/a"], ["0.75", "{}/a", "0.25", "{}/b"]])
def test_a_run_reads_from_a_store_what_it_would_from_a_disk(template: list[str], tmp_path: Path) -> None:
    near = [part.format(tmp_path) for part in template]
    far = [part.format("s3://bucket") for part in template]
    (tmp_path / "far").mkdir()
    with serve_bucket() as bucket:
        for name, num_documents in (("a", 100), ("b", 60)):
            bucket.put(write(tmp_path / name, num_documents), name)
        assert tokens(built(far, tmp_path / "far")) == tokens(built(near, tmp_path))
        entries = sorted((tmp_path / "far" / "cache").iterdir())
        again = built(far, tmp_path / "far")
        assert tokens(again) == tokens(built(near, tmp_path))
        assert sorted((tmp_path / "far" / "cache").iterdir()) == entries  # nothing was built or fetched anew
        assert bucket.num_reads("a.idx") <= 1 + 2 * len(far)  # whole once; besides, the head of it at each start
