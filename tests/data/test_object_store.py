"""A dataset in an object store reads as the same files on a disk, whatever goes wrong on the way."""

from __future__ import annotations

import builtins
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron.data.block_cache import BlockCache
from megatron.data.indexed import IndexedDataset, default_cache_path
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.object_store import ObjectStore, StoredFile, is_remote
from megatron.data.source import check_vocabulary, open_data
from megatron.errors import ConfigError, DataError
from object_server import Bucket, serve_bucket

URL = "s3://bucket/data/corpus"
NUM_DOCUMENTS = 40


@pytest.fixture
def local(tmp_path: Path) -> IndexedDataset:
    """Documents of 0 to 400 tokens."""
    random = np.random.default_rng(1)
    with IndexedDatasetWriter(tmp_path / "local" / "corpus", "uint16") as writer:
        for length in random.integers(0, 400, NUM_DOCUMENTS):
            writer.add_document(random.integers(0, 1000, length).astype(np.uint16))
    return IndexedDataset(tmp_path / "local" / "corpus")


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with serve_bucket() as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket, local: IndexedDataset) -> Bucket:
    server.clear()
    server.put(Path(local.prefix), "data/corpus")
    return server


class Waits(list[float]):
    """Takes note instead of waiting."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def store(tmp_path: Path, waits: Waits) -> ObjectStore:
    """Small blocks, and room for a few of them, so that both matter."""
    return ObjectStore(tmp_path / "cache", blocks=BlockCache(capacity_bytes=1 << 13, block_bytes=1 << 10), sleep=waits)


def test_every_part_of_every_sequence_is_what_the_disk_holds(
    bucket: Bucket, store: ObjectStore, local: IndexedDataset
) -> None:
    remote = IndexedDataset(URL, store)
    assert (len(remote), remote.num_tokens, remote.dtype) == (len(local), local.num_tokens, local.dtype)
    assert remote.is_remote and not local.is_remote
    for i in range(len(local)):
        assert np.array_equal(remote.get(i), local.get(i))
        length = int(local.sequence_lengths[i])
        assert np.array_equal(remote.get(i, length // 3, length // 2), local.get(i, length // 3, length // 2))
    assert np.array_equal(remote.tokens[5:-7], local.tokens[5:-7])
    with pytest.raises(IndexError):
        remote.get(NUM_DOCUMENTS)


def test_spans_of_sequences_are_those_of_the_disk(bucket: Bucket, store: ObjectStore, local: IndexedDataset) -> None:
    remote = IndexedDataset(URL, store)
    random = np.random.default_rng(2)
    for _ in range(15):
        sequences = random.integers(0, NUM_DOCUMENTS, random.integers(1, 9)).astype(np.int32)
        first, last = (int(local.sequence_lengths[sequences[i]]) for i in (0, -1))
        stop = int(random.integers(0, last + 1))
        offset = int(random.integers(0, (stop if len(sequences) == 1 else first) + 1))
        ours, theirs = (dataset.read_span(sequences, offset, stop, 4000) for dataset in (remote, local))
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_copy_in_a_store_is_the_same_data(bucket: Bucket, store: ObjectStore, local: IndexedDataset) -> None:
    assert IndexedDataset(URL, store).fingerprint == local.fingerprint


def test_the_suffix_may_be_given(bucket: Bucket, store: ObjectStore) -> None:
    assert IndexedDataset(f"{URL}.bin", store).prefix == URL


def test_the_index_is_fetched_once_and_again_when_it_has_changed(
    bucket: Bucket, store: ObjectStore, tmp_path: Path
) -> None:
    for _ in range(3):
        IndexedDataset(URL, store)
    assert bucket.num_reads("data/corpus.idx") == 1
    assert bucket.num_reads("data/corpus.bin") == 0
    with IndexedDatasetWriter(tmp_path / "other", "uint16") as writer:  # as large, but cut elsewhere
        for length in [1] * (NUM_DOCUMENTS - 1) + [3]:
            writer.add_document(np.zeros(length, np.uint16))
    bucket.put(tmp_path / "other", "data/corpus")
    assert IndexedDataset(URL, store).num_tokens == NUM_DOCUMENTS + 2
    assert bucket.num_reads("data/corpus.idx") == 2
    assert not [name for name in os.listdir(store.cache_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("failures", [["refused"], ["cut"], ["cut", "refused", "cut"]])
def test_what_fails_for_a_while_is_read_in_the_end(
    failures: list[str], bucket: Bucket, store: ObjectStore, local: IndexedDataset
) -> None:
    remote = IndexedDataset(URL, store)
    bucket.failures.extend(failures)
    assert np.array_equal(remote.tokens[0:500], local.tokens[0:500])
    assert not bucket.failures


def test_blocks_that_are_kept_are_not_asked_for_again(bucket: Bucket, store: ObjectStore) -> None:
    tokens = IndexedDataset(URL, store).tokens
    first, num_reads = tokens[0:512], bucket.num_reads("data/corpus.bin")
    assert np.array_equal(tokens[100:300], first[100:300])
    assert bucket.num_reads("data/corpus.bin") == num_reads == 1


class Faulty:
    """A file system that answers as it is told: bytes, or an error to raise."""

    def __init__(self, *answers: object):
        self.answers = list(answers)

    def cat_ranges(self, paths: list[str], starts: list[int], stops: list[int], on_error: str) -> list[object]:
        assert on_error == "return"
        return [self.answers.pop(0) for _ in paths]

    def info(self, path: str) -> dict[str, object]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict)
        return answer


FILE = StoredFile("s3://bucket/x.bin", 8, "x")


def faulty(monkeypatch: pytest.MonkeyPatch, *answers: object) -> Faulty:
    filesystem = Faulty(*answers)
    monkeypatch.setattr("megatron.data.object_store._filesystem", lambda url: (filesystem, url))
    return filesystem


def test_only_the_ranges_that_failed_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, store: ObjectStore, waits: Waits
) -> None:
    faulty(monkeypatch, b"ab", b"c", TimeoutError(), b"cd", OSError("reset"), b"ef")
    assert store.read_ranges(FILE, [(0, 2), (2, 4), (4, 6)]) == [b"ab", b"cd", b"ef"]
    assert len(waits) == 2 and waits[0] < waits[1]


def test_a_store_that_keeps_failing_is_an_error_of_this_rank(
    monkeypatch: pytest.MonkeyPatch, store: ObjectStore, waits: Waits
) -> None:
    faulty(monkeypatch, *[b"short"] * 8)
    with pytest.raises(DataError, match=r"after 8 attempts \(5 bytes came of the 8 from byte 0 on\).*checkpoint") as e:
        store.read_ranges(FILE, [(0, 8)])
    assert e.value.this_rank_only and len(waits) == 7


def test_a_store_that_cannot_say_whether_a_file_is_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, store: ObjectStore
) -> None:
    faulty(monkeypatch, TimeoutError("no answer"), {"size": 8, "ETag": "v"})
    assert store.find(FILE.url) == StoredFile(FILE.url, 8, f"{FILE.url} 8 ETag=v")
    faulty(monkeypatch, *[TimeoutError("no answer")] * 3)
    with pytest.raises(DataError, match=r"x.bin: cannot be read \(TimeoutError: no answer\); check the address"):
        store.find(FILE.url)
    faulty(monkeypatch, PermissionError("Forbidden"))
    with pytest.raises(DataError, match=r"PermissionError: Forbidden\); check the address, the credentials"):
        store.find(FILE.url)


def test_a_missing_dataset_half_a_dataset_and_a_cut_one_are_told(bucket: Bucket, store: ObjectStore) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/data/none: there is no tokenized dataset of this name, neither"):
        IndexedDataset("s3://bucket/data/none", store)
    content = bucket.objects.pop("data/corpus.bin")
    with pytest.raises(DataError, match=r"s3://bucket/data/corpus.bin: missing beside corpus.idx; a dataset is both"):
        IndexedDataset(URL, store)
    bucket.objects["data/corpus.bin"] = content[:-2]
    with pytest.raises(DataError, match=r"s3://bucket/data/corpus.bin: \d+ bytes, but corpus.idx describes \d+; the"):
        IndexedDataset(URL, store)


def test_an_id_beyond_the_vocabulary_is_found(bucket: Bucket, store: ObjectStore, local: IndexedDataset) -> None:
    remote = IndexedDataset(URL, store)
    check_vocabulary(remote, 1000)
    with pytest.raises(DataError, match=r"s3://bucket/data/corpus.bin: token id 999 at position"):
        check_vocabulary(remote, 999)


def test_a_remote_dataset_is_merged_as_a_local_one(
    bucket: Bucket, store: ObjectStore, local: IndexedDataset, tmp_path: Path
) -> None:
    with IndexedDatasetWriter(tmp_path / "copy", "uint16") as writer:
        writer.add_dataset(IndexedDataset(URL, store))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == Path(f"{local.prefix}{suffix}").read_bytes()


def test_other_stores_are_read_in_the_same_way(store: ObjectStore, local: IndexedDataset) -> None:
    import fsspec

    for suffix in (".bin", ".idx"):
        fsspec.filesystem("memory").pipe_file(f"/corpus{suffix}", Path(f"{local.prefix}{suffix}").read_bytes())
    assert np.array_equal(IndexedDataset("memory://corpus", store).get(3), local.get(3))


def test_only_tokenized_data_is_read_and_nothing_written(store: ObjectStore) -> None:
    with pytest.raises(DataError, match="s3://bucket/a.jsonl: is text in an object store.*tools/preprocess_data.py"):
        open_data("s3://bucket/a.jsonl")
    with pytest.raises(ConfigError, match="s3://bucket/a: is in an object store, which is read only; write to a disk"):
        IndexedDatasetWriter("s3://bucket/a", "uint16")


def test_an_unknown_store_and_a_missing_package_are_told(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nowhere://a.idx: is in no store .*Protocol not known.*use s3://"):
        IndexedDataset("nowhere://a", store)
    real_import = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] in ("fsspec", "s3fs"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs a package .*pip install fsspec s3fs"):
        IndexedDataset("s3://bucket/a", store)


def test_a_cache_folder_that_cannot_be_written_is_named(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/cache: s3://bucket/data/corpus.idx cannot be kept here .*data_cache"):
        IndexedDataset(URL, ObjectStore(tmp_path / "file" / "cache"))


def test_a_full_disk_leaves_no_copy_of_the_index(bucket: Bucket, store: ObjectStore) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(
            DataError, match=r"corpus.idx cannot be kept here \(File too large\); give a writable folder"
        ):
            IndexedDataset(URL, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in store.cache_path.iterdir()] == [".lock"]
    assert len(IndexedDataset(URL, store)) == NUM_DOCUMENTS


def test_what_is_made_from_far_data_is_kept_at_home() -> None:
    assert is_remote(URL) and not is_remote("data/corpus")
    assert default_cache_path("data/corpus") == Path("data/cache")
    assert default_cache_path(URL) == Path.home() / ".cache" / "megatron"
