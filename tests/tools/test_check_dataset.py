"""Every fault of a dataset is named with its position; what opening refuses, the check finds too."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data.check import check_dataset
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import ConfigError, DataError
from object_server import serve_bucket
from tools.check_dataset import main

SAMPLES = Path(__file__).parent.parent / "data" / "samples" / "indexed"
LENGTHS = 34  # where they begin in an index
NUM_SEQUENCES = 5
POINTERS = LENGTHS + 4 * NUM_SEQUENCES
DOCUMENTS = POINTERS + 8 * NUM_SEQUENCES


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with IndexedDatasetWriter(tmp_path / "data", "uint16") as writer:
        for length in (3, 1, 0, 4, 2):
            writer.add_document(np.arange(10, 10 + length, dtype=np.uint16))
    return tmp_path / "data"


def patch(prefix: Path, offset: int, value: bytes) -> None:
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[offset : offset + len(value)] = value
    Path(f"{prefix}.idx").write_bytes(content)


def int32(value: int) -> bytes:
    return struct.pack("<i", value)


def int64(value: int) -> bytes:
    return struct.pack("<q", value)


def faults(prefix: Path | str, vocab_size: int | None = None) -> list[str]:
    return [finding.text for finding in check_dataset(prefix, vocab_size) if finding.is_fault]


@pytest.mark.parametrize("sample", sorted(path.stem for path in SAMPLES.glob("*.idx")))
def test_what_other_programs_wrote_is_sound_wherever_it_opens(sample: str):
    prefix = SAMPLES / sample
    try:
        IndexedDataset(prefix)
    except DataError:
        assert faults(prefix)
    else:
        assert faults(prefix) == []


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (9, int64(3), "data.idx: byte 9 holds version 3; 1 is the only one there is"),
        (17, b"\x09", "data.idx: byte 17 holds dtype code 9; known are [1, 2, 3, 4, 5, 6, 7, 8]"),
        (LENGTHS + 4, int32(-1), "data.idx: sequence 1 has length -1"),
        (POINTERS + 8, int64(4), "data.idx: sequence 1 starts at byte 4, where byte 6 was expected"),
        (LENGTHS + 16, int32(5), "data.idx: sequence 4 ends at byte 26, beyond the 20 of data.bin"),
        (LENGTHS + 16, int32(1), "data.bin: 2 bytes from byte 18 on belong to no sequence"),
        (DOCUMENTS, int64(1), "data.idx: the document index begins with 1, not 0"),
        (DOCUMENTS + 40, int64(4), "data.idx: the document index ends with 4 of 5 sequences"),
        (DOCUMENTS + 16, int64(4), "data.idx: document 2 begins at sequence 4 and ends before it, at 3"),
    ],
)
def test_one_wrong_number_is_one_fault_at_its_place(offset: int, value: bytes, expected: str, prefix: Path):
    patch(prefix, offset, value)
    assert f"{prefix.parent}/{expected}" in faults(prefix)
    with pytest.raises(DataError):
        IndexedDataset(prefix)


def test_several_faults_are_all_named(prefix: Path):
    patch(prefix, POINTERS + 8, int64(4))
    patch(prefix, POINTERS + 24, int64(0))
    patch(prefix, DOCUMENTS, int64(1))
    assert len(faults(prefix)) == 3


@pytest.mark.parametrize("kept", [0, 5, 33, 60, 100])
def test_a_truncated_index_says_where_it_ends(kept: int, prefix: Path):
    content = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(content[:kept])
    assert any(f"ends at byte {kept}" in text or "byte 0 is" in text for text in faults(prefix))


def test_ids_beyond_the_vocabulary_are_placed_and_counted(tmp_path: Path):
    with IndexedDatasetWriter(tmp_path / "data", "int32") as writer:
        writer.add_document(np.array([1, 2, 700]))
        writer.add_document(np.array([-5, 3]))
        writer.add_document(np.full(30, 500))
    found = faults(tmp_path / "data", vocab_size=500)
    assert found[0].endswith("data.bin: token 2 is 700 (sequence 0, offset 2), outside 0 to 499")
    assert found[1].endswith("data.bin: token 3 is -5 (sequence 1, offset 0), outside 0 to 499")
    assert found[-1].endswith("data.bin: token: 22 more like the last") and len(found) == 11


def test_leftovers_and_empty_sequences_are_warnings(prefix: Path, capsys):
    (prefix.parent / "data.bin.123.tmp").write_bytes(b"x")
    main([str(prefix), "--vocab_size=100"])
    out = capsys.readouterr().out
    assert "warning" in out and "data.bin.123.tmp: left by a program that was interrupted" in out
    assert "warning" in out and "1 sequences are empty" in out
    assert f"{prefix}: sound: 5 documents, 10 tokens (uint16), all ids below 100" in out


def test_the_exit_status_tells(prefix: Path, capsys):
    patch(prefix, LENGTHS + 4, int32(-1))
    with pytest.raises(SystemExit) as ending:
        main([str(prefix)])
    assert ending.value.code == 1
    out = capsys.readouterr().out
    assert "FAULT   " in out and f"{prefix}: 5 faults\n" in out


def test_missing_halves_are_named(prefix: Path, capsys):
    Path(f"{prefix}.bin").unlink()
    assert faults(prefix) == [f"{prefix}.bin: is missing"]
    with pytest.raises(SystemExit):
        main([str(prefix)])
    assert capsys.readouterr().out.endswith(f"{prefix}: 1 fault\n")
    assert len(faults(prefix.parent / "absent")) == 2


def test_both_halves_of_instruction_data_are_checked(prefix: Path):
    folder = prefix.parent
    for part, values in (("text", [[5, 6, 7], [8]]), ("role", [[0, 1, 2], [3]])):
        with IndexedDatasetWriter(folder / f"chat-{part}", "uint16") as writer:
            for value in values:
                writer.add_document(np.array(value))
    assert faults(folder / "chat", 100) == [
        f"{folder}/chat-role.bin: token 3 is 3 (sequence 1, offset 0), outside 0 to 2"
    ]
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{prefix}{suffix}", folder / f"chat-role{suffix}")
    assert any("chat-text has 2 sequences and" in text for text in faults(folder / "chat"))


def test_a_vocabulary_of_nothing_is_an_error(prefix: Path):
    with pytest.raises(ConfigError, match="--vocab_size 0 is no vocabulary"):
        main([str(prefix), "--vocab_size=0"])


def test_a_dataset_in_an_object_store_is_checked_like_one_on_a_disk(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    with serve_bucket() as bucket:
        bucket.put(prefix, "far")
        main(["s3://bucket/far", "--vocab_size", "15"])
        assert "s3://bucket/far: sound: 5 documents, 10 tokens (uint16)" in capsys.readouterr().out
        bucket.objects["far.bin"] = bucket.objects["far.bin"][:-2]
        local = faults_of_cut(prefix)
        assert [text.replace("s3://bucket/far", str(prefix)) for text in faults("s3://bucket/far")] == local
        assert faults("s3://bucket/none") == ["s3://bucket/none.bin: is missing", "s3://bucket/none.idx: is missing"]


def faults_of_cut(prefix: Path) -> list[str]:
    bin_path = Path(f"{prefix}.bin")
    bin_path.write_bytes(bin_path.read_bytes()[:-2])
    return [text.replace(bin_path.name, "far.bin") for text in faults(prefix)]
