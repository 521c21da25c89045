from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.data.inputs import check_inputs, find_inputs, identify_input
from megatron.errors import ConfigError, DataError


def test_a_glob_gives_its_files_sorted_by_name_where_it_stands(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs([f"{tmp_path}/c.txt", f"{tmp_path}/*.jsonl", f"{tmp_path}/deep/**/*.jsonl"])
    assert [path.name for path in found] == ["c.txt", "a.jsonl", "b.jsonl", "d.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "a[1].jsonl").touch()
    (tmp_path / "a1.jsonl").touch()
    assert find_inputs([f"{tmp_path}/a[1].jsonl"]) == [tmp_path / "a[1].jsonl"]


def test_a_glob_without_matches_is_an_error(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"--input .*\*\.jsonl matches no file; check the folder and the pattern"):
        find_inputs([f"{tmp_path}/*.jsonl"])


def test_text_that_would_count_twice_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(
        ConfigError, match=r"names .*a\.jsonl twice, by .*a\.jsonl and .*\*; its text would count twice"
    ):
        find_inputs([f"{tmp_path}/a.jsonl", f"{tmp_path}/*"])


def test_inputs_that_are_no_text_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file.*; check --input"):
        check_inputs([tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match=r"is a folder; name the files in it, for example '.*/\*\.jsonl'"):
        check_inputs([tmp_path])
    (tmp_path / "a.zip").touch()
    with pytest.raises(
        DataError, match=r"a\.zip is not a text file by its name \(\.zip\); give JSON lines, .txt or par"
    ):
        check_inputs([tmp_path / "a.zip"])


def test_pipes_and_devices_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "named")
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"):
        for path in (Path(f"/dev/fd/{reader}"), tmp_path / "named", Path("/dev/null")):
            with pytest.raises(DataError, match=rf"^{path} is a pipe or a device, .*; write the text into a file\.$"):
                check_inputs([path])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_named(tmp_path):
    (tmp_path / "a.jsonl").touch(mode=0)
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: Permission denied"):
        check_inputs([tmp_path / "a.jsonl"])


def test_a_file_is_another_one_when_its_content_changes_and_the_same_when_only_its_time_does(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("one")
    before = identify_input(file)
    os.utime(file, (0, 0))
    assert identify_input(file) == before
    file.write_text("two")
    assert identify_input(file) != before
