"""The cache is complete or absent, built once, and never believed where it does not match."""

import errno
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.index_cache import Arrays, EntryWriter, cached_arrays, cached_entry
from megatron.errors import DataError

KEY = {"seed": 1, "data": "abc"}


def build() -> Arrays:
    return {"order": np.arange(1000, dtype=np.int32), "empty": np.empty((0, 2), dtype=np.int64)}


def must_not_build() -> Arrays:
    raise AssertionError("the cached arrays should have been used")


def the_entry(folder: Path) -> Path:
    (entry,) = (path for path in folder.iterdir() if path.is_dir() and path.suffix != ".tmp")
    return entry


def assert_built(arrays: Arrays) -> None:
    assert arrays.keys() == build().keys()
    for name, array in build().items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_arrays_come_back_mapped_and_unchanged(tmp_path: Path):
    assert_built(cached_arrays(tmp_path / "cache", "gpt", KEY, build))
    again = cached_arrays(tmp_path / "cache", "gpt", KEY, must_not_build)
    assert_built(again)
    assert isinstance(again["order"], np.memmap) and not again["order"].flags.writeable


def test_each_part_of_the_key_makes_its_own_entry(tmp_path: Path):
    for key in (KEY, {**KEY, "seed": 2}, {**KEY, "data": "abd"}, {**KEY, "split": "train"}):
        cached_arrays(tmp_path, "gpt", key, build)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 4


def truncate(entry: Path) -> None:
    os.truncate(entry / "order.npy", 200)


def empty_array(entry: Path) -> None:
    os.truncate(entry / "order.npy", 0)


def flip_a_byte(entry: Path) -> None:
    content = bytearray((entry / "order.npy").read_bytes())
    content[-1] ^= 1
    (entry / "order.npy").write_bytes(content)


def remove_array(entry: Path) -> None:
    (entry / "order.npy").unlink()


def remove_manifest(entry: Path) -> None:
    (entry / "manifest.json").unlink()


def break_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text('{"key": ')


def list_manifest(entry: Path) -> None:
    (entry / "manifest.json").write_text("[]")


def foreign_manifest(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, "key": {"seed": 2}}))


def pickled_array(entry: Path) -> None:
    np.save(entry / "order.npy", np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty_array,
        flip_a_byte,
        remove_array,
        remove_manifest,
        break_manifest,
        list_manifest,
        foreign_manifest,
        pickled_array,
    ],
)
def test_a_damaged_or_foreign_entry_is_built_again(damage, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    cached_arrays(tmp_path, "gpt", KEY, build)
    damage(the_entry(tmp_path))
    assert_built(cached_arrays(tmp_path, "gpt", KEY, build))
    assert "is damaged or not of this data; it is built again" in caplog.text
    assert_built(cached_arrays(tmp_path, "gpt", KEY, must_not_build))


KILLED_BUILDER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from megatron.data import index_cache
real, calls = os.fsync, []
def fsync(descriptor):
    calls.append(descriptor)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
build = lambda: {"order": np.arange(1000, dtype=np.int32), "empty": np.empty((0, 2), dtype=np.int64)}
index_cache.cached_arrays(Path(sys.argv[1]), "gpt", {"seed": 1, "data": "abc"}, build)
"""


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_while_writing_leaves_no_entry_and_no_lock(call: int, tmp_path: Path):
    result = subprocess.run([sys.executable, "-c", KILLED_BUILDER, str(tmp_path), str(call)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [path for path in tmp_path.iterdir() if path.is_dir() and path.suffix != ".tmp"] == []
    assert_built(cached_arrays(tmp_path, "gpt", KEY, build))
    (left,) = tmp_path.glob("*.tmp")  # young enough to be that of a process at work on another node
    for path in (*left.iterdir(), left):
        os.utime(path, (0, 0))
    truncate(the_entry(tmp_path))
    cached_arrays(tmp_path, "gpt", KEY, build)
    assert not left.exists()


def test_where_locks_hold_within_a_node_only_two_nodes_may_build_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)

    def build_while_the_other_node_does() -> Arrays:
        assert_built(cached_arrays(tmp_path, "gpt", KEY, build))
        return build()

    assert_built(cached_arrays(tmp_path, "gpt", KEY, build_while_the_other_node_does))
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock") == [""]


def build_and_count(folder: str, barrier, builds) -> None:
    def counting_build() -> Arrays:
        with builds.get_lock():
            builds.value += 1
        return build()

    barrier.wait()
    assert_built(cached_arrays(Path(folder), "gpt", KEY, counting_build))


def start_together(folder: Path, num_processes: int) -> int:
    """Let processes ask for one entry at the same moment; return how many of them built it."""
    context = multiprocessing.get_context("fork")
    barrier, builds = context.Barrier(num_processes), context.Value("i", 0)
    processes = [
        context.Process(target=build_and_count, args=(str(folder), barrier, builds)) for _ in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * num_processes
    return builds.value


def test_one_process_builds_while_the_others_wait(tmp_path: Path):
    assert start_together(tmp_path, 4) == 1


def test_on_a_file_system_without_locks_all_processes_still_get_the_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert start_together(tmp_path, 4) >= 1
    assert_built(cached_arrays(tmp_path, "gpt", KEY, must_not_build))
    assert list(tmp_path.glob("*.tmp")) == []


def test_an_error_while_building_leaves_nothing(tmp_path: Path):
    def fail() -> Arrays:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        cached_arrays(tmp_path, "gpt", KEY, fail)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_folder_that_cannot_be_written_names_the_flag(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/cache: the index cache cannot be written .*--data_cache_path"):
        cached_arrays(tmp_path / "file" / "cache", "gpt", KEY, build)


def test_an_entry_that_does_not_survive_writing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron.data.index_cache._checksum", lambda path: os.urandom(4).hex())
    with pytest.raises(DataError, match="damaged directly after it was written; check the disk"):
        cached_arrays(tmp_path, "gpt", KEY, build)


def test_a_finished_entry_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cached_arrays(tmp_path, "gpt", KEY, build)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("megatron.data.index_cache.exclusive", read_only)
    monkeypatch.setattr(Path, "mkdir", read_only)
    assert_built(cached_arrays(tmp_path, "gpt", KEY, must_not_build))
    with pytest.raises(DataError, match=r"cannot be written \(Read-only file system\)"):
        cached_arrays(tmp_path, "gpt", {**KEY, "seed": 2}, build)


def test_arrays_may_come_in_parts_and_in_any_order(tmp_path: Path):
    def write(writer: EntryWriter) -> None:
        with writer.array("joined", (1000, 2), np.int32) as append:
            for start in range(0, 1000, 300):
                append(np.arange(2 * start, min(2000, 2 * start + 600), dtype=np.uint16).reshape(-1, 2))
        writer.save("other", np.ones(3))

    for _ in range(2):
        arrays = cached_entry(tmp_path, "gpt", KEY, write)
        assert arrays["joined"].dtype == np.int32
        assert np.array_equal(arrays["joined"], np.arange(2000).reshape(1000, 2))
        assert arrays["other"].tolist() == [1.0, 1.0, 1.0]


def test_an_array_that_is_not_whole_is_not_kept(tmp_path: Path):
    def write(writer: EntryWriter) -> None:
        with writer.array("joined", (10,), np.int32) as append:
            append(np.arange(9))

    with pytest.raises(AssertionError, match="joined is not whole"):
        cached_entry(tmp_path, "gpt", KEY, write)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def large() -> Arrays:
        return {"small": np.zeros(10), "large": np.zeros(1 << 20)}

    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(DataError, match=r"the index cache cannot be written \(File too large\); give a writable"):
            cached_arrays(tmp_path, "gpt", KEY, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert_built(cached_arrays(tmp_path, "gpt", KEY, build))
