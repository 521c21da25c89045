"""One process works while the others wait, with one line that says so."""

import errno
import fcntl
import logging
from pathlib import Path

import pytest

from megatron.data.file_lock import exclusive


def test_waiting_for_another_holder_is_logged_once_and_ends_when_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The other holder lets go when it hears of the waiting, so the test neither sleeps nor hangs."""
    messages = []

    class LetGo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())
            fcntl.flock(other, fcntl.LOCK_UN)

    logger = logging.getLogger("megatron.data.file_lock")
    handler = LetGo()
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    try:
        with open(tmp_path / "entry.lock", "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with exclusive(tmp_path / "entry") as is_alone:
                assert is_alone
    finally:
        logger.removeHandler(handler)
    assert messages == [f"waiting for another process that builds {tmp_path / 'entry'}"]


def test_a_file_system_without_locks_is_told_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusive(tmp_path / "entry") as is_alone:
        assert not is_alone


def test_any_other_failure_of_the_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), exclusive(tmp_path / "entry"):
        pass
