"""--data_path opens a dataset or tokenizes a text once, and ids outside the vocabulary are found at start."""

import fcntl
import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.source import check_vocabulary, open_data
from megatron.errors import DataError

SAMPLES = Path(__file__).parent / "samples"


def tokenize_bytes(file: Path, prefix: Path) -> None:
    """A tokenizer whose ids are the bytes of each line."""
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for line in file.read_bytes().splitlines():
            writer.add_document(list(line))


def must_not_tokenize(file: Path, prefix: Path) -> None:
    raise AssertionError("the cached tokens should have been used")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("ab\nc\n")
    return path


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_prefix_opens_the_dataset_without_a_tokenizer(suffix: str):
    assert len(open_data(f"{SAMPLES}/gpt/base{suffix}")) == 60


@pytest.mark.parametrize("name", ["notes.txt", "notes.jsonl"])
def test_text_is_tokenized_once_saying_so(name: str, text: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    text = text.rename(text.with_name(name))
    first = open_data(text, tokenize_file=tokenize_bytes)
    assert first.tokens.tolist() == [97, 98, 99]
    assert caplog.messages == [f"tokenizing {text} once into {first.prefix}.bin and .idx"]
    assert Path(first.prefix).parent == text.parent / "cache"
    again = open_data(text, tokenize_file=must_not_tokenize)
    assert again.prefix == first.prefix and len(caplog.messages) == 1


def test_another_tokenizer_or_changed_text_is_tokenized_again(text: Path, tmp_path: Path):
    def tokens(fingerprint: str) -> tuple[Path, list[int]]:
        dataset = open_data(
            text, tokenize_file=tokenize_bytes, tokenizer_fingerprint=fingerprint, cache_path=tmp_path / "tokens"
        )
        return dataset.prefix, dataset.tokens.tolist()

    first = tokens("bytes")
    assert tokens("other")[0] != first[0]
    facts = text.stat()
    text.write_text("ab\nd\n")
    os.utime(text, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # the same size and time: only the content differs
    assert tokens("bytes")[1] == [97, 98, 100]


def test_a_damaged_cached_dataset_is_made_again(text: Path, caplog: pytest.LogCaptureFixture):
    prefix = open_data(text, tokenize_file=tokenize_bytes).prefix
    os.truncate(f"{prefix}.bin", 1)
    assert open_data(text, tokenize_file=tokenize_bytes).tokens.tolist() == [97, 98, 99]
    assert "the cached dataset is damaged and is made again" in caplog.text


def open_and_count(text: str, barrier, count) -> None:
    def tokenize(file: Path, prefix: Path) -> None:
        with count.get_lock():
            count.value += 1
        tokenize_bytes(file, prefix)

    barrier.wait()
    assert open_data(text, tokenize_file=tokenize).tokens.tolist() == [97, 98, 99]


def test_one_process_tokenizes_while_the_others_wait(text: Path):
    context = multiprocessing.get_context("fork")
    barrier, count = context.Barrier(3), context.Value("i", 0)
    processes = [context.Process(target=open_and_count, args=(str(text), barrier, count)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert count.value == 1


def test_where_locks_hold_within_a_node_only_two_nodes_may_tokenize_at_once(
    text: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    others: list[IndexedDataset] = []

    def tokenize_while_the_other_node_does(file: Path, prefix: Path) -> None:
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_document([97, 98])
            others.append(open_data(text, tokenize_file=tokenize_bytes))
            writer.add_document([99])

    ours = open_data(text, tokenize_file=tokenize_while_the_other_node_does)
    assert ours.prefix == others[0].prefix
    assert ours.tokens.tolist() == others[0].tokens.tolist() == [97, 98, 99]
    assert sorted(path.suffix for path in Path(ours.prefix).parent.iterdir()) == [".bin", ".idx", ".lock"]


def test_what_a_killed_process_left_goes_once_nobody_can_be_working_on_it(text: Path):
    prefix = open_data(text, tokenize_file=tokenize_bytes).prefix
    old, young = (Path(f"{prefix}.{name}.tmp.unfinished") for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
        (folder / "tokens").write_bytes(b"")
    old_file = Path(f"{prefix}.old.tmp.bin")
    old_file.write_bytes(b"")
    for path in (old / "tokens", old, old_file):
        os.utime(path, (0, 0))
    os.truncate(f"{prefix}.bin", 1)
    open_data(text, tokenize_file=tokenize_bytes)
    assert young.exists() and not old.exists() and not old_file.exists()


def test_an_error_of_the_tokenizer_reaches_the_user_and_leaves_no_dataset(text: Path):
    def fail(file: Path, prefix: Path) -> None:
        raise DataError(f"{file}:1: not JSON")

    with pytest.raises(DataError, match=r"notes.txt:1: not JSON"):
        open_data(text, tokenize_file=fail)
    assert [path.suffix for path in (text.parent / "cache").iterdir()] == [".lock"]


def test_text_without_a_tokenizer_is_an_error(text: Path):
    with pytest.raises(DataError, match=r"notes.txt: is text, and there is no tokenizer .*--tokenizer_type"):
        open_data(text)


def test_text_that_does_not_exist_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent.jsonl: there is no such text file; check --data_path"):
        open_data(tmp_path / "absent.jsonl", tokenize_file=tokenize_bytes)


def test_a_folder_that_cannot_be_written_names_the_flag(text: Path):
    with pytest.raises(DataError, match=r"the tokenized notes.txt cannot be cached here .*--data_cache_path"):
        open_data(text, tokenize_file=tokenize_bytes, cache_path=text / "cache")


def write(prefix: Path, tokens: np.ndarray) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, tokens.dtype) as writer:
        writer.add_document(tokens)
    return IndexedDataset(prefix)


def test_the_largest_id_is_compared_with_the_vocabulary(tmp_path: Path):
    dataset = write(tmp_path / "data", np.array([3, 9, 1], dtype=np.uint16))
    check_vocabulary(dataset, 10)
    with pytest.raises(
        DataError, match=r"data.bin: token id 9 at position 1 is outside the vocabulary of 9 \(0 to 8\)"
    ):
        check_vocabulary(dataset, 9)


def test_a_negative_id_is_outside_every_vocabulary(tmp_path: Path):
    dataset = write(tmp_path / "data", np.array([3, -1], dtype=np.int32))
    with pytest.raises(DataError, match="token id -1 at position 1 is outside the vocabulary of 10"):
        check_vocabulary(dataset, 10)


def test_every_token_of_a_small_dataset_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron.data.source._CHECK_BLOCK_TOKENS", 7)
    for position in range(50):
        tokens = np.zeros(50, dtype=np.uint16)
        tokens[position] = 10
        with pytest.raises(DataError, match=f"token id 10 at position {position} is outside"):
            check_vocabulary(write(tmp_path / "data", tokens), 10)


def test_a_huge_dataset_is_sampled_from_its_first_to_its_last_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At most 12 tokens in blocks of 3 out of 50: blocks start at 0, 15, 31 and 47."""
    monkeypatch.setattr("megatron.data.source._CHECK_BLOCK_TOKENS", 3)
    monkeypatch.setattr("megatron.data.source._MAX_TOKENS_CHECKED", 12)
    found = []
    for position in range(50):
        tokens = np.zeros(50, dtype=np.uint16)
        tokens[position] = 10
        try:
            check_vocabulary(write(tmp_path / "data", tokens), 10)
        except DataError:
            found.append(position)
    assert found == [0, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49]


def test_a_dataset_without_tokens_fits_every_vocabulary():
    check_vocabulary(IndexedDataset(SAMPLES / "indexed" / "mlm_no_documents_u16"), 1)


def test_values_that_are_no_ids_are_refused():
    with pytest.raises(DataError, match="holds float32 values, which are not token ids"):
        check_vocabulary(IndexedDataset(SAMPLES / "indexed" / "mlm_f32_code7"), 10)
