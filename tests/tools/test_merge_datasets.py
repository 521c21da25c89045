"""Merging gives what the others' merging gives, and refuses what is no pair or of two kinds."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.merge import merge, open_all
from megatron.errors import ConfigError, DataError
from tools.merge_datasets import main

SAMPLES = Path(__file__).parent.parent / "data" / "samples" / "indexed"

# (what the other program merged, in this order; what it wrote)
MERGES = {
    "Megatron-LLM": (("mllm_u16", "mlm_u16", "mllm_u16"), "mllm_merged_u16"),
    "Megatron-LM": (("mlm_u16", "mlm_only_empty_docs_u16", "mlm_u16"), "mlm_merged_u16"),
}


def folder_of(tmp_path: Path, names: tuple[str, ...]) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    for i, name in enumerate(names):
        for suffix in (".bin", ".idx"):
            shutil.copyfile(SAMPLES / f"{name}{suffix}", folder / f"{i}-{name}{suffix}")
    return folder


@pytest.mark.parametrize("program", MERGES)
def test_a_merge_is_byte_for_byte_that_of_the_other_programs(program: str, tmp_path: Path, capsys):
    names, expected = MERGES[program]
    main([f"--input={folder_of(tmp_path, names)}", f"--output_prefix={tmp_path / 'merged'}"])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (SAMPLES / f"{expected}{suffix}").read_bytes()
    assert f"wrote {tmp_path / 'merged'}.bin and .idx: 3 datasets" in capsys.readouterr().out


def test_without_a_copy_in_the_kernel_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    names, expected = MERGES["Megatron-LLM"]
    heard: list[int] = []
    merged = merge(open_all([SAMPLES / name for name in names]), tmp_path / "merged", on_bytes=heard.append)
    assert Path(f"{merged.prefix}.bin").read_bytes() == (SAMPLES / f"{expected}.bin").read_bytes()
    assert sum(heard) == merged.num_tokens * 2


def test_instruction_data_keeps_its_bare_document_index(tmp_path: Path):
    """Its documents are its sequences; the one boundary it has is 0."""
    for name, lengths in (("a", (3, 2)), ("b", (4,))):
        with IndexedDatasetWriter(tmp_path / name, "uint16") as writer:
            for length in lengths:
                writer.add_document(np.arange(length, dtype=np.uint16))
        content = bytearray((tmp_path / f"{name}.idx").read_bytes())
        content[26:34] = (1).to_bytes(8, "little")
        (tmp_path / f"{name}.idx").write_bytes(content[: -8 * len(lengths)])
    merged = merge(open_all([tmp_path / "a", tmp_path / "b"]), tmp_path / "ab", on_bytes=lambda _: None)
    assert merged.document_indices.tolist() == [0]
    assert merged.sequence_lengths.tolist() == [3, 2, 4] and merged.num_documents == 3


def test_data_of_two_kinds_of_documents_is_refused(tmp_path: Path):
    with IndexedDatasetWriter(tmp_path / "plain", "uint16") as writer:
        writer.add_document(np.arange(3, dtype=np.uint16))
    shutil.copyfile(tmp_path / "plain.bin", tmp_path / "bare.bin")
    content = bytearray((tmp_path / "plain.idx").read_bytes())
    content[26:34] = (1).to_bytes(8, "little")
    (tmp_path / "bare.idx").write_bytes(content[:-8])
    with pytest.raises(DataError, match=r"plain has a document index and .*bare has none"):
        open_all([tmp_path / "plain", tmp_path / "bare"])


def test_two_dtypes_are_refused_by_name(tmp_path: Path):
    folder = folder_of(tmp_path, ("mllm_u16", "mllm_i32"))
    with pytest.raises(DataError, match=r"0-mllm_u16 holds uint16 and .*1-mllm_i32 int32; datasets of one tokenizer"):
        main([f"--input={folder}", f"--output_prefix={tmp_path / 'merged'}"])
    assert not list(tmp_path.glob("merged*"))


def test_half_a_pair_and_an_empty_folder_are_errors(tmp_path: Path):
    with pytest.raises(DataError, match="absent: is not a folder"):
        main([f"--input={tmp_path / 'absent'}", f"--output_prefix={tmp_path / 'merged'}"])
    with pytest.raises(DataError, match="holds no .bin and .idx files"):
        main([f"--input={tmp_path}", f"--output_prefix={tmp_path / 'merged'}"])
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"x.bin: has no .idx beside it; complete the dataset"):
        main([f"--input={tmp_path}", f"--output_prefix={tmp_path / 'merged'}"])


def test_the_output_may_not_be_an_input(tmp_path: Path):
    folder = folder_of(tmp_path, ("mllm_u16",))
    with pytest.raises(ConfigError, match="is one of the datasets in"):
        main([f"--input={folder}", f"--output_prefix={folder / '0-mllm_u16.bin'}"])


def test_the_output_may_not_be_an_input_by_another_name(tmp_path: Path):
    folder = folder_of(tmp_path, ("mllm_u16",))
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "linked").mkdir()
    for suffix in (".bin", ".idx"):
        (tmp_path / "linked" / f"a{suffix}").symlink_to(folder / f"0-mllm_u16{suffix}")
    same = folder / "0-mllm_u16"
    for given, output in (
        (folder, tmp_path / "link" / same.name),
        (tmp_path / "link", same),
        (folder, folder / ".." / folder.name / same.name),
        (tmp_path / "linked", same),
    ):
        with pytest.raises(ConfigError, match="is one of the datasets in"):
            main([f"--input={given}", f"--output_prefix={output}"])


def test_a_damaged_part_is_named_and_nothing_is_left(tmp_path: Path):
    folder = folder_of(tmp_path, ("mllm_u16", "mlm_u16"))
    os.truncate(folder / "1-mlm_u16.bin", 10)
    with pytest.raises(DataError, match=r"1-mlm_u16.bin: 10 bytes"):
        main([f"--input={folder}", f"--output_prefix={tmp_path / 'merged'}"])
    assert not list(tmp_path.glob("merged*"))


def test_a_merge_replaces_what_has_its_name_at_the_end_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Who has the old files open goes on reading them."""
    names, expected = MERGES["Megatron-LLM"]
    folder = folder_of(tmp_path, names)
    for suffix in (".bin", ".idx"):
        shutil.copyfile(SAMPLES / f"mlm_u16{suffix}", tmp_path / f"merged{suffix}")
    reader = IndexedDataset(tmp_path / "merged")
    old = reader.tokens.tolist()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"merged: cannot be written \(No space left on device\); what stood under"):
            main([f"--input={folder}", f"--output_prefix={tmp_path / 'merged'}"])
    assert sorted(path.name for path in tmp_path.glob("merged*")) == ["merged.bin", "merged.idx"]
    assert IndexedDataset(tmp_path / "merged").tokens.tolist() == old
    main([f"--input={folder}", f"--output_prefix={tmp_path / 'merged'}"])
    assert reader.tokens.tolist() == old
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (SAMPLES / f"{expected}{suffix}").read_bytes()
