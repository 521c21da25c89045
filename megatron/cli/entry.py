"""How a command starts and ends: one line for an error of the user's, a traceback for one of ours."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from megatron.errors import MegatronError

if TYPE_CHECKING:
    from megatron.core.topology import LaunchEnvironment

# A launcher ends all processes of a host as soon as one of them fails, and local rank 0, which prints the
# message, may be the last to finish its imports. The others therefore leave this much later.
LOCAL_RANK_0_GRACE_S = 10.0
# What a shell reports of a command that SIGPIPE ended.
CLOSED_PIPE_STATUS = 128 + 13


def run_main(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main` with the arguments (default: the command line's), and leaves with status 2 on a MegatronError.

    An error that all ranks share is printed once per host, by local rank 0; one that only this rank can see
    is printed by it, with its number, at once if it says so, else when local rank 0 turns out not to have failed.
    Whoever reads the output may stop, as ``| head`` does. Any other exception is a bug and keeps its traceback.
    """
    try:
        main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # not when the interpreter ends, where a closed pipe cannot be told from a bug
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        sys.exit(CLOSED_PIPE_STATUS)
    except MegatronError as error:
        _report(error)
        sys.exit(error.EXIT_STATUS)


def run_and_leave(main: Callable[[list[str]], None]) -> NoReturn:
    """`run_main` for a command that starts a process group: its end does not tear down the interpreter.

    gloo's threads abort a process now and then when they outlive the modules they use.
    """
    status = 0
    try:
        run_main(main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def warn(message: str) -> None:
    """Prints a warning once per host, before logging is set up."""
    if _launch_environment().local_rank == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _reader_has_left() -> bool:
    """Whether nobody reads standard output any more; then what is still to be written there is dropped."""
    output = select.poll()
    output.register(sys.stdout, 0)  # errors are told in any case
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _report(error: MegatronError) -> None:
    launch = _launch_environment()
    line = f"{type(error).__name__}: {error}"
    if error.this_rank_only:
        print(f"[rank {launch.rank}] {line}", file=sys.stderr, flush=True)
    elif launch.local_rank == 0:
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(LOCAL_RANK_0_GRACE_S)
        # Still here: local rank 0 has not failed, so this process is the only one that knows.
        print(f"[rank {launch.rank}] {line}", file=sys.stderr, flush=True)


def _launch_environment() -> LaunchEnvironment:
    # Imported late: it brings torch, which --help and a tool's usage error need not wait for.
    from megatron.core.topology import launch_environment

    return launch_environment()
