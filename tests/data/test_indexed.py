"""The .bin/.idx files: byte for byte those of the other programs, and checked when opened."""

import gc
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.data.index_file import HEADER, LEGACY_HEADER
from megatron.data.indexed import IndexedDataset, best_dtype
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import DataError

SAMPLES = Path(__file__).parent / "samples" / "indexed"
ALL_NAMES = sorted(path.stem for path in SAMPLES.glob("*.json"))
CURRENT_NAMES = [name for name in ALL_NAMES if "legacy" not in name]


def facts_of(name: str) -> dict:
    return {"sequences": [], **json.loads((SAMPLES / f"{name}.json").read_text())}


def write_sample(facts: dict, prefix: Path) -> None:
    """Write the described sequences and document boundaries again with our writer."""
    boundaries = facts["document_indices"]
    with IndexedDatasetWriter(prefix, facts["dtype"]) as writer:
        for start, stop in pairwise(boundaries):
            for tokens in facts["sequences"][start:stop]:
                writer.add_item(np.array(tokens, dtype=facts["dtype"]))
            writer.end_document()


def write_three(folder: Path) -> Path:
    prefix = folder / "three"
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in ([1, 2, 3], [4], [5, 6]):
            writer.add_document(document)
    return prefix


def patch(path: Path, position: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[position : position + len(content)] = content
    path.write_bytes(raw)


# Reading what others wrote


@pytest.mark.parametrize("name", ALL_NAMES)
def test_files_of_other_programs_read_exactly(name: str):
    facts, dataset = facts_of(name), IndexedDataset(SAMPLES / name)
    assert len(dataset) == len(facts["sequences"])
    assert dataset.dtype == np.dtype(facts["dtype"])
    assert dataset.sequence_lengths.tolist() == facts.get("sequence_lengths", facts.get("sizes"))
    assert dataset.document_indices.tolist() == facts["document_indices"]
    assert dataset.num_documents == len(facts["document_indices"]) - 1
    assert dataset.num_tokens == sum(map(len, facts["sequences"]))
    assert [dataset.get(index).tolist() for index in range(len(dataset))] == facts["sequences"]
    assert dataset.tokens.tolist() == list(chain.from_iterable(facts["sequences"]))


@pytest.mark.parametrize("name", [name for name in CURRENT_NAMES if "get" in facts_of(name)])
def test_parts_of_sequences_are_those_megatron_lm_returns(name: str):
    dataset = IndexedDataset(SAMPLES / name)
    for call in facts_of(name)["get"]:
        assert dataset.get(call["idx"], call["offset"], call["length"]).tolist() == call["tokens"]


def test_a_document_index_of_only_zero_makes_each_sequence_a_document(tmp_path: Path):
    prefix = write_three(tmp_path)
    raw = Path(f"{prefix}.idx").read_bytes()
    end_of_pointers = HEADER.size + 12 * 3
    header = HEADER.pack(*HEADER.unpack(raw[: HEADER.size])[:-1], 1)
    Path(f"{prefix}.idx").write_bytes(header + raw[HEADER.size : end_of_pointers] + struct.pack("<q", 0))
    dataset = IndexedDataset(prefix)
    assert dataset.num_documents == 3
    assert dataset.document_indices.tolist() == [0]
    assert dataset.get(2).tolist() == [5, 6]


def test_dtype_code_7_is_float64_where_the_bin_file_has_eight_bytes_a_value(tmp_path: Path):
    shutil.copy(SAMPLES / "mlm_f64_code6.bin", tmp_path / "double.bin")
    shutil.copy(SAMPLES / "mlm_f64_code6.idx", tmp_path / "double.idx")
    patch(tmp_path / "double.idx", 17, b"\x07")
    assert IndexedDataset(tmp_path / "double").get(0).tolist() == [0.5, -1.25, 30000.0]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_prefix_bin_and_idx_name_the_same_dataset(suffix: str):
    assert len(IndexedDataset(f"{SAMPLES}/mlm_u16{suffix}")) == 8


def test_views_outlive_the_dataset():
    view = IndexedDataset(SAMPLES / "mlm_u16").get(7)
    gc.collect()
    assert view.tolist() == facts_of("mlm_u16")["sequences"][7]


def test_tokens_cannot_be_changed_through_a_view():
    with pytest.raises(ValueError, match="read-only"):
        IndexedDataset(SAMPLES / "mlm_u16").get(0)[0] = 1


@pytest.mark.parametrize("arguments", [(8,), (-1,), (0, 8), (0, -1), (0, 0, 8), (0, 3, 5), (0, 0, -1)])
def test_reading_outside_a_sequence_is_an_index_error(arguments: tuple[int, ...]):
    with pytest.raises(IndexError, match="mlm_u16, which has"):
        IndexedDataset(SAMPLES / "mlm_u16").get(*arguments)


# Writing


@pytest.mark.parametrize("name", [name for name in CURRENT_NAMES if "multimodal" not in name])
def test_files_are_byte_for_byte_those_of_other_programs(name: str, tmp_path: Path):
    write_sample(facts_of(name), tmp_path / "copy")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == (SAMPLES / f"{name}{suffix}").read_bytes()


def test_a_document_given_with_lengths_equals_its_items(tmp_path: Path):
    with IndexedDatasetWriter(tmp_path / "lengths", np.int32) as writer:
        writer.add_document([1, 2, 3], lengths=[2, 0, 1])
        writer.add_document([], lengths=[])
    with IndexedDatasetWriter(tmp_path / "items", np.int32) as writer:
        for item in ([1, 2], [], [3]):
            writer.add_item(item)
        writer.end_document()
        writer.end_document()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"lengths{suffix}").read_bytes() == (tmp_path / f"items{suffix}").read_bytes()
    assert IndexedDataset(tmp_path / "lengths").document_indices.tolist() == [0, 3, 3]


def test_pointers_continue_over_the_writers_and_the_readers_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron.data.indexed_writer.CHUNK_SEQUENCES", 3)
    monkeypatch.setattr("megatron.data.index_file.CHUNK_SEQUENCES", 2)
    for name in ("mlm_u16", "mllm_merged_u16"):
        write_sample(facts_of(name), tmp_path / name)
        assert (tmp_path / f"{name}.idx").read_bytes() == (SAMPLES / f"{name}.idx").read_bytes()
        assert len(IndexedDataset(tmp_path / name)) == len(facts_of(name)["sequences"])


def test_the_writer_keeps_at_most_24_bytes_a_document(tmp_path: Path):
    writer = IndexedDatasetWriter(tmp_path / "many", np.uint16)
    tokens = np.ones(1, dtype=np.uint16)
    for _ in range(10_000):
        writer.add_document(tokens)
    kept = sys.getsizeof(writer._lengths) + sys.getsizeof(writer._boundaries)
    writer.finalize()
    assert kept <= 24 * 10_000


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "uint16"), (65499, "uint16"), (65500, "int32")])
def test_best_dtype_is_uint16_below_65500(vocab_size: int, dtype: str):
    assert best_dtype(vocab_size) == np.dtype(dtype)


def test_nothing_appears_under_the_final_names_before_finalize(tmp_path: Path):
    writer = IndexedDatasetWriter(tmp_path / "data", np.uint16)
    writer.add_document([1, 2])
    assert not {"data.bin", "data.idx"} & set(os.listdir(tmp_path))
    writer.finalize()
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.idx"]


def test_an_error_while_writing_leaves_the_folder_as_it_was(tmp_path: Path):
    with pytest.raises(KeyError), IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1, 2])
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_an_unfinished_document_at_the_end_of_the_block_leaves_nothing(tmp_path: Path):
    with (
        pytest.raises(DataError, match="the last 1 sequences belong to no document; call end_document"),
        IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer,
    ):
        writer.add_item([1])
    assert os.listdir(tmp_path) == []


def test_an_aborted_rewrite_keeps_the_earlier_dataset(tmp_path: Path):
    prefix = write_three(tmp_path)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    writer.add_document([9])
    writer.abort()
    assert IndexedDataset(prefix).get(0).tolist() == [1, 2, 3]


KILLED_WRITER = """
import os, signal, sys
import numpy as np
from megatron.data import indexed_writer
when, prefix = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
writer = indexed_writer.IndexedDatasetWriter(prefix, np.uint16)
writer.add_document(np.arange(1000, dtype=np.uint16))
replaced = []
def replace(source, target, rename=os.replace):
    if len(replaced) == int(when):
        die()
    replaced.append(target)
    rename(source, target)
os.replace = replace
writer.finalize()
"""


@pytest.mark.parametrize("finished_renames", [0, 1])
@pytest.mark.parametrize("over_an_earlier_dataset", [False, True])
def test_a_kill_while_finalizing_leaves_nothing_that_opens(
    finished_renames: int, over_an_earlier_dataset: bool, tmp_path: Path
):
    prefix = write_three(tmp_path) if over_an_earlier_dataset else tmp_path / "three"
    result = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(finished_renames), str(prefix)], check=False)
    assert result.returncode == -signal.SIGKILL
    with pytest.raises(DataError):
        IndexedDataset(prefix)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tokens = np.zeros(1 << 20, dtype=np.uint16)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with (
            pytest.raises(DataError, match=r"data: cannot be written \(File too large\); what stood under this"),
            IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer,
        ):
            writer.add_document(tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written .*Choose a folder"):
        IndexedDatasetWriter(tmp_path / "file" / "data", np.uint16)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([1, 70000, 65536], "document 1: token id 70000 does not fit into uint16 .0 to 65535."),
        ([1, -1], "document 1: token id -1 does not fit into uint16"),
        (np.array([1.5]), "document 1: tokens of dtype float64 cannot be ids"),
        ([[1, 2]], "tokens of shape .1, 2. are not one sequence"),
    ],
)
def test_ids_that_the_dtype_cannot_hold_are_refused(tokens: list, reason: str, tmp_path: Path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1])
        with pytest.raises(DataError, match=reason):
            writer.add_document(tokens)
    assert IndexedDataset(tmp_path / "data").num_tokens == 1


@pytest.mark.parametrize("lengths", [[2], [2, 2], [4, -1]])
def test_lengths_that_do_not_add_up_are_refused(lengths: list[int], tmp_path: Path):
    with (
        IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer,
        pytest.raises(DataError, match=r"document 0 has 3 tokens, but its sequence lengths .* add up"),
    ):
        writer.add_document([1, 2, 3], lengths=lengths)


def test_a_dtype_without_a_code_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"dtype complex64 has no code in the .idx format; use one of uint8"):
        IndexedDatasetWriter(tmp_path / "data", np.complex64)


# Damaged files. Three documents of 3, 1 and 2 uint16 tokens: lengths at byte 34, pointers at 46, documents at 70.


@pytest.mark.parametrize(
    ("position", "content", "reason"),
    [
        (0, b"GARBAGE", "three.idx: byte 0 is b'GARBAGE.*not the start of an index"),
        (9, b"\x02", "three.idx: index version 2, only version 1 is known"),
        (17, b"\x09", "three.idx: unknown dtype code 9 .known: 1 uint8"),
        (17, b"\x04", "three.idx: sequence 1 has length 1 and starts at byte 6, where .* end at byte 12"),
        (18, b"\x04", "three.idx: ends at byte 102, but 4 sequences and 4 document boundaries need 114 bytes"),
        (18, b"\xff" * 8, "three.idx: ends at byte 102, but 18446744073709551615 sequences"),
        (26, b"\x03", "three.idx: 102 bytes, but its header announces 3 sequences and 3 .* which take 94"),
        (34, b"\x02", "three.idx: sequence 1 has length 1 and starts at byte 6, where .* end at byte 4"),
        (38, b"\xff" * 4, "three.idx: sequence 1 has length -1"),
        (54, b"\x00", "three.idx: sequence 1 has length 1 and starts at byte 0"),
        (46, b"\x02", "three.idx: sequence 0 has length 3 and starts at byte 2"),
        (70, b"\x01", "three.idx: the document index runs from 1 to 3, but has to run from 0 to 3"),
        (94, b"\x04", "three.idx: the document index runs from 0 to 4"),
        (78, b"\x03", "three.idx: document 1 starts at sequence 3 and ends before it, at sequence 2"),
    ],
)
def test_a_damaged_idx_file_is_named_with_the_position(position: int, content: bytes, reason: str, tmp_path: Path):
    prefix = write_three(tmp_path)
    patch(Path(f"{prefix}.idx"), position, content)
    with pytest.raises(DataError, match=reason) as error:
        IndexedDataset(prefix)
    assert "repeat the preprocessing" in str(error.value)


def test_an_idx_file_cut_anywhere_is_refused(tmp_path: Path):
    prefix = write_three(tmp_path)
    raw = Path(f"{prefix}.idx").read_bytes()
    for num_bytes in range(len(raw)):
        Path(f"{prefix}.idx").write_bytes(raw[:num_bytes])
        with pytest.raises(DataError, match=rf"three.idx: ends at byte {num_bytes}, but .* the file is truncated"):
            IndexedDataset(prefix)


def test_an_empty_document_index_is_refused(tmp_path: Path):
    prefix = write_three(tmp_path)
    raw = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(raw[:26] + bytes(8) + raw[34:70])
    with pytest.raises(DataError, match=r"three.idx: the document index is empty"):
        IndexedDataset(prefix)


def test_a_truncated_bin_file_is_refused_when_opened(tmp_path: Path):
    prefix = write_three(tmp_path)
    os.truncate(f"{prefix}.bin", 11)
    with pytest.raises(DataError, match=r"three.bin: 11 bytes, but three.idx describes 12; the file is truncated"):
        IndexedDataset(prefix)


def test_an_empty_bin_file_is_refused_when_opened(tmp_path: Path):
    prefix = write_three(tmp_path)
    os.truncate(f"{prefix}.bin", 0)
    with pytest.raises(
        DataError, match=r"three.bin: 0 bytes, but three.idx describes 12; the file is truncated at byte 0"
    ):
        IndexedDataset(prefix)


def test_a_bin_file_of_another_run_is_refused_when_opened(tmp_path: Path):
    prefix = write_three(tmp_path)
    os.truncate(f"{prefix}.bin", 14)
    with pytest.raises(DataError, match=r"describes only 12; the two files do not belong together.*truncate -s 12"):
        IndexedDataset(prefix)


def test_a_float_file_of_neither_width_is_refused(tmp_path: Path):
    for suffix in (".bin", ".idx"):
        shutil.copy(SAMPLES / f"mlm_f32_code7{suffix}", tmp_path / f"float{suffix}")
    os.truncate(tmp_path / "float.bin", 15)
    with pytest.raises(DataError, match=r"float.bin: 15 bytes, but 4 values under dtype code 7 take 16 .* or 32"):
        IndexedDataset(tmp_path / "float")


@pytest.mark.parametrize(("missing", "present"), [(".idx", ".bin"), (".bin", ".idx")])
def test_half_a_dataset_names_the_missing_half(missing: str, present: str, tmp_path: Path):
    prefix = write_three(tmp_path)
    Path(f"{prefix}{missing}").unlink()
    with pytest.raises(DataError, match=f"three{missing}: missing beside three{present}; a dataset is both files"):
        IndexedDataset(prefix)


def test_a_dataset_that_does_not_exist_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(DataError, match=r"there is no tokenized dataset of this name.*tools/preprocess_data.py"):
        IndexedDataset(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (1, 2, "index version 2"),
        (2, 99, "unknown dtype code 99"),
        (3, 8, "pairs dtype code 4 with 8 bytes an element"),
        (5, 4, "5 sequences with 4 sizes"),
        (6, 5, "ends at byte 224, but 5 sequences and 5 document boundaries need 232"),
    ],
)
def test_a_damaged_legacy_idx_file_is_refused(field: int, value: int, reason: str, tmp_path: Path):
    for suffix in (".bin", ".idx"):
        shutil.copy(SAMPLES / f"mllm_legacy_tntidx_i32{suffix}", tmp_path / f"old{suffix}")
    raw = (tmp_path / "old.idx").read_bytes()
    header = list(LEGACY_HEADER.unpack(raw[: LEGACY_HEADER.size]))
    header[field] = value
    patch(tmp_path / "old.idx", 0, LEGACY_HEADER.pack(*header))
    with pytest.raises(DataError, match=reason):
        IndexedDataset(tmp_path / "old")


# Identity


def test_a_copy_has_the_same_fingerprint_and_changed_content_another(tmp_path: Path):
    prefix = write_three(tmp_path)
    original = IndexedDataset(prefix).fingerprint
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"copy{suffix}")
    assert IndexedDataset(tmp_path / "copy").fingerprint == original
    patch(tmp_path / "copy.bin", 0, b"\x63")
    assert IndexedDataset(tmp_path / "copy").fingerprint != original
    with IndexedDatasetWriter(tmp_path / "cut", np.uint16) as writer:  # the same tokens, cut elsewhere
        for document in ([1, 2], [3, 4], [5, 6]):
            writer.add_document(document)
    assert IndexedDataset(tmp_path / "cut").fingerprint != original
