"""A folder that is saved to belongs to one process, and to nobody when that one has ended, however it ended."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint_samples import save_from_one_process
from megatron.checkpoint.ownership import LOCK_FILE, owned
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError
from other_runs import another_process_owns


def test_the_process_that_owns_the_folder_is_named(tmp_path: Path) -> None:
    with another_process_owns(tmp_path):
        for attempt in (lambda: save_from_one_process(tmp_path, ParallelLayout()), owned(tmp_path).__enter__):
            with pytest.raises(CheckpointError) as error:
                attempt()
            assert str(error.value) == (
                f"{tmp_path} belongs to process 4711 on node7, which saves its checkpoints there; "
                "give each run a folder of its own to save to, or wait until that one has ended."
            )
    with another_process_owns(tmp_path, says=""), pytest.raises(CheckpointError, match="belongs to another process,"):
        owned(tmp_path).__enter__()


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    with another_process_owns(tmp_path) as other:
        other.kill()
        other.wait()
        with owned(tmp_path):
            assert (tmp_path / LOCK_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from megatron.checkpoint.ownership import owned
with owned(Path(sys.argv[1])):
    if os.fork() == 0:
        print("child", flush=True)
        sys.stdin.read()
        os._exit(0)
    sys.stdout.flush()
    os._exit(9)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"child\n"
        assert parent.wait() == 9
        with owned(tmp_path):
            pass
        assert parent.stdin is not None
        parent.stdin.close()


def test_a_folder_is_free_when_its_owner_has_left(tmp_path: Path) -> None:
    with owned(tmp_path):
        pass
    with another_process_owns(tmp_path):
        pass
    save_from_one_process(tmp_path, ParallelLayout())


def test_a_file_system_without_locks_is_saved_to_with_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    assert save_from_one_process(tmp_path, ParallelLayout()).exists()
    (warning,) = caplog.messages
    assert warning == (
        f"{tmp_path} is on a file system without locks (Function not implemented), so nothing keeps a second run from "
        "saving there; give each run a folder of its own"
    )
