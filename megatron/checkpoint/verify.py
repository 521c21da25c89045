"""Looking for damage: everything that is wrong, not the first of it.

Files of this project are compared with the checksums in the manifest, tile by tile. Other formats have none: their
files are read to the end, and every tensor of the model must be there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.locate import (
    TRACKER_FILE,
    complete_folder,
    find_checkpoint,
    iteration_folder,
    iteration_of,
    list_folders,
    list_iterations,
    read_tracker,
)
from megatron.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest, read_manifest
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.show import format_bytes
from megatron.checkpoint.source import Source, row_chunks
from megatron.checkpoint.tokenizer_files import TOKENIZER_FOLDER, identity_of, is_recorded
from megatron.checkpoint.verified_file import VerifiedFile
from megatron.errors import CheckpointError, MegatronError
from megatron.tokenizer import TokenizerConfig, build_tokenizer


@dataclass(frozen=True)
class Findings:
    """What was looked at, the `damage` found, and `remarks` on what is odd but loses nothing."""

    path: Path
    num_files: int
    num_bytes: int
    damage: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the terminal; the last line is the verdict."""
        verdict = f"{len(self.damage)} damaged place(s)" if self.damage else "no damage"
        return [
            *(f"DAMAGED  {message}" for message in self.damage),
            *(f"note     {message}" for message in self.remarks),
            f"{self.path}: {verdict} in {self.num_files} file(s), {format_bytes(self.num_bytes)}",
        ]


def folders_to_verify(path: Path, iteration: int | None = None, *, every: bool = False) -> list[Path]:
    """`path` itself if it is an iteration's folder; else `iteration` of a run, the one its tracker names, or `every`
    one, also those that are not complete. Where the tracker names none that is there, the newest that is.

    Raises CheckpointError where there is none.
    """
    if (path / MANIFEST_FILE).exists():
        return [path]
    if every:
        return [complete_folder(path, number) or iteration_folder(path, number) for number in list_folders(path)]
    try:
        return [find_checkpoint(path, iteration)]
    except CheckpointError:
        if iteration is not None or not (found := list_iterations(path)):
            raise
        return [iteration_folder(path, found[-1])]  # `verify_tracker` says what is wrong


def stored_bytes(folder: Path) -> int:
    """The bytes that verifying an iteration's folder will read; 0 where that cannot be known."""
    try:
        return sum(record.num_bytes - record.header_bytes for record in read_manifest(folder).files.values())
    except CheckpointError:
        return 0


def verify_iteration(folder: Path, *, num_workers: int = 1, on_bytes: Callable[[int], object]) -> Findings:
    """Reads every byte of an iteration of this project. `on_bytes` hears of bytes that were read."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Findings(folder, 1, 0, (str(error),))
    lock = threading.Lock()

    def report(num_bytes: int) -> None:
        with lock:
            on_bytes(num_bytes)

    with ThreadPoolExecutor(num_workers) as executor:
        names, records = list(manifest.files), list(manifest.files.values())
        found = executor.map(lambda name, record: _file_damage(folder, name, record, report), names, records)
        damage = [message for messages in found for message in messages]
    return Findings(
        folder,
        1 + len(manifest.files),
        (folder / MANIFEST_FILE).stat().st_size + sum(record.num_bytes for record in manifest.files.values()),
        (*damage, *_tokenizer_damage(folder, manifest)),
        (
            *_remarks_on_name(folder, manifest),
            *(
                f"{file} is not part of the checkpoint"
                for file in sorted(folder.iterdir())
                if file.name not in (MANIFEST_FILE, *manifest.files)
            ),
        ),
    )


def verify_tracker(root: Path) -> Findings:
    """The file of a run's folder that names the latest iteration must name one that is there."""
    tracker = root / TRACKER_FILE
    size = tracker.stat().st_size if tracker.exists() else 0
    try:
        iteration = read_tracker(root)
    except CheckpointError as error:
        return Findings(tracker, 1, size, (str(error),))
    found = list_folders(root)
    if complete_folder(root, iteration) is None:
        return Findings(tracker, 1, size, (f"{tracker} names iteration {iteration}, which is not there; correct it.",))
    later = [number for number in found if number > iteration]
    remarks = (f"{tracker} names iteration {iteration}, and {max(later)} is there as well",) if later else ()
    return Findings(tracker, 1, size, (), remarks)


def verify_source(source: Source, *, on_bytes: Callable[[int], object]) -> Findings:
    """Reads every tensor of a source without checksums. Opening it has compared its tensors with its model."""
    damage, num_bytes = [], 0
    for name in source.names():
        whole = Rectangle.whole(source.shape(name))
        try:
            for rows in row_chunks(source, name, whole.start, whole.size):
                num_bytes += rows.nbytes
                on_bytes(rows.nbytes)
        except CheckpointError as error:
            damage.append(str(error))
    num_files = sum(file.is_file() for file in source.path.rglob("*")) if source.path.is_dir() else 1
    return Findings(source.path, num_files, num_bytes, tuple(damage))


def _file_damage(folder: Path, name: str, record: FileRecord, on_bytes: Callable[[int], object]) -> list[str]:
    try:
        return VerifiedFile(folder, name, record).damage(on_bytes=on_bytes)
    except CheckpointError as error:
        return [str(error)]


def _remarks_on_name(folder: Path, manifest: Manifest) -> list[str]:
    held = manifest.info.state.iteration
    is_named_so = iteration_of(folder) in (held, None)
    return [] if is_named_so else [f"{folder} holds iteration {held}: it was copied or renamed"]


def _tokenizer_damage(folder: Path, manifest: Manifest) -> list[str]:
    """The tokenizer beside a checkpoint must be the one its embedding was trained with."""
    recorded, beside = manifest.info.tokenizer, folder.parent / TOKENIZER_FOLDER
    if recorded is None or recorded.sha256 is None or not beside.is_dir():
        return []
    held = identity_of(beside)
    if held is not None and (held.tokenizer_type, held.sha256) == (recorded.tokenizer_type, recorded.sha256):
        return []
    # Which files count, and what else does, each type knows for itself.
    section = manifest.info.state.config.get("tokenizer")
    encoding: Any = section.get("tiktoken_encoding") if isinstance(section, Mapping) else None
    config = TokenizerConfig(recorded.tokenizer_type, str(beside), tiktoken_encoding=encoding, no_new_tokens=True)
    try:
        tokenizer = build_tokenizer(config)
    except MegatronError as error:
        return [f"{beside} cannot be loaded as the {recorded.tokenizer_type} of {folder.name}: {error}"]
    if is_recorded(recorded, tokenizer, beside):
        return []
    return [
        f"{beside} is not the tokenizer of {folder.name}: its SHA-256 is {tokenizer.identity.file_sha256}, that in "
        f"the manifest {recorded.sha256}. Restore its files, or load with the right one as --tokenizer_model."
    ]
