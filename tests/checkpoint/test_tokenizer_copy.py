"""A tokenizer beside checkpoints is never half of one, and never another one by accident."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from megatron.checkpoint.tokenizer_copy import copy_tokenizer
from megatron.errors import CheckpointError


def written(folder: Path, **contents: str) -> dict[str, Path]:
    """Files with "." for "_" in their names, by these names."""
    folder.mkdir(parents=True)
    files = {name.replace("_", ".", 1): folder / name.replace("_", ".", 1) for name in contents}
    for file, content in zip(files.values(), contents.values(), strict=True):
        file.write_text(content)
    return files


def held(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_every_file_is_durable_under_its_name_when_the_copy_is_done(tmp_path: Path, monkeypatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    files = written(tmp_path / "in", tokenizer_json="{}")
    copy_tokenizer(files, tmp_path / "run" / "tokenizer", may_replace=False)
    assert events[0] == ("sync", ".tmp-tokenizer.json")
    assert events[1:] == [("name", "tokenizer.json"), ("sync", "tokenizer"), ("sync", "run")]
    assert held(tmp_path / "run" / "tokenizer") == {"tokenizer.json": "{}"}


def test_a_copy_of_the_same_tokenizer_changes_nothing_and_completes_a_part(tmp_path: Path, caplog) -> None:
    files = written(tmp_path / "in", tokenizer_json="{}", tokenizer_model="pieces")
    there = written(tmp_path / "tokenizer", tokenizer_json="{}")["tokenizer.json"]
    before = there.stat().st_ino, there.stat().st_mtime_ns
    for may_replace in (False, True):
        copy_tokenizer(files, tmp_path / "tokenizer", may_replace=may_replace)
    assert (there.stat().st_ino, there.stat().st_mtime_ns) == before
    assert held(tmp_path / "tokenizer") == {"tokenizer.json": "{}", "tokenizer.model": "pieces"}
    assert not caplog.messages


@pytest.mark.parametrize("others", [{"tokenizer_model": "others"}, {"tokenizer_json": "{}"}], ids=str)
def test_another_tokenizer_is_refused_or_named_when_it_is_replaced(tmp_path: Path, others, caplog) -> None:
    files = written(tmp_path / "in", tokenizer_model="pieces")
    written(tmp_path / "tokenizer", **others)
    before = held(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match=rf"holds another tokenizer \(its {next(iter(before))}\), .*; choose an"):
        copy_tokenizer(files, tmp_path / "tokenizer", may_replace=False)
    assert held(tmp_path / "tokenizer") == before
    copy_tokenizer(files, tmp_path / "tokenizer", may_replace=True)
    assert held(tmp_path / "tokenizer")["tokenizer.model"] == "pieces"
    assert f"held another tokenizer (its {next(iter(before))}), which is replaced" in caplog.messages[0]


def test_a_copy_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch) -> None:
    files = written(tmp_path / "in", tokenizer_model="pieces")
    written(tmp_path / "tokenizer", tokenizer_model="others")

    def full(source: Path, target: Path) -> None:
        target.write_text("pi")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"cannot be copied to .* \(No space left on device\); choose another"):
        copy_tokenizer(files, tmp_path / "tokenizer", may_replace=True)
    assert held(tmp_path / "tokenizer") == {"tokenizer.model": "others"}
