"""A checkpoint appears whole or not at all.

Every rank writes into a hidden folder beside the others; when all have succeeded, rank 0 proves that every entry is
stored exactly once, writes the manifest, renames the folder into place and moves the tracker. An iteration that is
saved again is written anew beside the old one, which is set aside only when the new one is complete; what a crash
leaves behind is put right by the next save.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from pathlib import Path

from megatron.checkpoint.agreement import gather_to_first, on_every_rank, on_first_rank
from megatron.checkpoint.locate import STAGING_PREFIX, TRACKER_FILE, is_foreign, iteration_folder, replaced_folder
from megatron.checkpoint.manifest import Entry, Manifest, write_manifest
from megatron.checkpoint.ownership import owned
from megatron.checkpoint.source import CheckpointInfo
from megatron.checkpoint.storage import WrittenFile
from megatron.core.topology import Axis
from megatron.durable import sync_folder
from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

_GIB = 2**30


def commit(
    root: Path,
    info: CheckpointInfo,
    write: Callable[[Path], list[WrittenFile]],
    world: Axis,
    *,
    expected: Collection[str],
    num_bytes: int = 0,
    is_owned: bool = False,
) -> Path:
    """Calls ``write(folder)`` on every rank and publishes what they wrote as one iteration; returns its folder.

    `expected` are the entries this rank knows of, written or not: one that no rank wrote is an error. `num_bytes`
    is about what this rank will write. With `is_owned` the caller holds `root` already (`owned`). Every rank
    returns, or every rank raises CheckpointError with the causes of the ranks that failed.
    """
    final = iteration_folder(root, info.state.iteration)
    with ExitStack() as lock:
        needs = gather_to_first(world, num_bytes)
        staging = on_first_rank(world, lambda: _prepare(final, sum(needs), None if is_owned else lock))
        try:
            files = on_every_rank(world, lambda: _write_into(staging, write))
            gathered = gather_to_first(world, (files, set(expected)))
            return on_first_rank(world, lambda: _publish(final, staging, info, gathered))
        except BaseException:
            if world.is_first:  # a stub on a full disk would only be in the way
                shutil.rmtree(staging, ignore_errors=True)
            raise


def check_save_folder(root: Path) -> None:
    """Raises CheckpointError if no checkpoint can be written to `root`; creates it. For the start of a run."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f"{STAGING_PREFIX}probe-{uuid.uuid4().hex}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint can be written to {root} ({error.strerror}); choose another folder to save to."
        ) from error


def check_room(root: Path, num_bytes: int) -> None:
    """Raises CheckpointError unless `root`, an existing folder, has room for `num_bytes` more."""
    free = shutil.disk_usage(root).free
    if free < num_bytes:
        raise CheckpointError(
            f"{root} has {free / _GIB:.3f} GiB free, and a checkpoint needs {num_bytes / _GIB:.3f} GiB; "
            "free some space, or save to another folder."
        )


def sweep(root: Path) -> None:
    """Removes what crashed saves left in `root`, which the caller owns, and brings back an iteration that one of them
    had just set aside. What cannot be removed stays, with a warning.
    """
    for leftover in root.glob(f"{STAGING_PREFIX}*"):
        _remove(leftover)
    for old in root.glob(replaced_folder(root / "iter_*").name):
        current = old.with_suffix("")
        if current.exists():  # the name has to be free even where the content cannot be removed
            _remove(old.rename(root / f"{STAGING_PREFIX}{uuid.uuid4().hex}"))
        else:
            old.rename(current)


def _remove(leftover: Path) -> None:
    try:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    except OSError as error:
        logger.warning(
            "%s was left by an earlier save and cannot be removed (%s); remove it by hand", leftover, error.strerror
        )


def _prepare(final: Path, num_bytes: int, lock: ExitStack | None) -> Path:
    root = final.parent
    check_save_folder(root)
    if lock is not None:
        lock.enter_context(owned(root))
    if is_foreign(final):
        raise CheckpointError(
            f"{final} exists and is no checkpoint of this program, so it is not replaced; "
            "move it away, or save to another folder."
        )
    sweep(root)
    check_room(root, num_bytes)
    staging = root / f"{STAGING_PREFIX}{uuid.uuid4().hex}"
    staging.mkdir()
    return staging


def _write_into(staging: Path, write: Callable[[Path], list[WrittenFile]]) -> list[WrittenFile]:
    if not staging.is_dir():
        raise CheckpointError(
            f"this host does not see {staging}, which rank 0 created; save to a file system that all hosts share."
        )
    return write(staging)


def _publish(
    final: Path, staging: Path, info: CheckpointInfo, gathered: Iterable[tuple[list[WrittenFile], set[str]]]
) -> Path:
    files = [file for written, _ in gathered for file in written]
    entries = _merge(files)
    unwritten = set().union(*(expected for _, expected in gathered)) - entries.keys()
    if unwritten:
        raise CheckpointError(
            f"iteration {info.state.iteration} would be incomplete: no rank wrote {', '.join(sorted(unwritten)[:4])}; "
            "each element has to be handed in as copy 0 by one rank."
        )
    for file in files:
        _check_visible(staging / file.name, file.record.num_bytes)
    manifest = Manifest(entries, {file.name: file.record for file in files}, info)
    manifest.check_tiling()
    write_manifest(staging, manifest)
    sync_folder(staging)
    replaced = replaced_folder(final)
    if final.exists():
        final.rename(replaced)
    staging.rename(final)
    sync_folder(final.parent)
    _write_tracker(final.parent, info.state.iteration)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _merge(files: Iterable[WrittenFile]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for written in (piece for file in files for piece in file.pieces):
        known = entries.get(written.entry, Entry(written.dtype, written.shape, ()))
        if (known.dtype, known.shape) != (written.dtype, written.shape):
            raise CheckpointError(
                f"{written.entry} is {known.dtype} {list(known.shape)} on one rank and {written.dtype} "
                f"{list(written.shape)} in {written.piece.file}; all ranks must build the same model."
            )
        entries[written.entry] = Entry(known.dtype, known.shape, (*known.pieces, written.piece))
    return entries


def _check_visible(path: Path, num_bytes: int) -> None:
    if not path.exists() or path.stat().st_size != num_bytes:
        raise CheckpointError(
            f"{path} was written by another host, but rank 0 does not see its {num_bytes} bytes; "
            "save to a file system that all hosts share."
        )


def _write_tracker(root: Path, iteration: int) -> None:
    temporary = root / f"{STAGING_PREFIX}tracker-{uuid.uuid4().hex}"
    try:
        with open(temporary, "w") as file:
            file.write(str(iteration))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(root / TRACKER_FILE)
        sync_folder(root)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"iteration {iteration} is complete, but {root / TRACKER_FILE} cannot be written ({error.strerror}); free "
            "some space, and write the number into it."
        ) from error
