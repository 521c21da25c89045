"""The manifest: the commit record of a checkpoint.

It says which entries there are, of which rectangles in which files each is made, the checksum of every tile of every
tensor in them, and everything of the run that is not a tensor. It is written last: a folder without one is no
checkpoint. The first line holds the checksum of all that follows it; the whole file is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron.checkpoint.container import DTYPE_NAMES, DTYPES
from megatron.checkpoint.plan import Rectangle, tiling_defect
from megatron.checkpoint.source import JSON, CheckpointInfo, RunState, TokenizerIdentity
from megatron.checkpoint.tiles import Tiles
from megatron.errors import CheckpointError, DamagedCheckpointError
from megatron.model.config import ModelConfig, RopeScaling

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """The rectangle of an entry that is stored as tensor `key` of `file`."""

    file: str
    key: str
    rectangle: Rectangle


@dataclass(frozen=True)
class Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like: `tiles` has the checksums of each of its tensors that has elements, by its key."""

    num_bytes: int
    header_bytes: int
    header_crc32: int
    tiles: Mapping[str, Tiles]


@dataclass(frozen=True)
class Manifest:
    entries: Mapping[str, Entry]
    files: Mapping[str, FileRecord]
    info: CheckpointInfo

    def check_tiling(self) -> None:
        """Raises CheckpointError unless the pieces of every entry cover it exactly once."""
        for name, entry in self.entries.items():
            defect = tiling_defect(entry.shape, [piece.rectangle for piece in entry.pieces])
            if defect is not None:
                raise DamagedCheckpointError(
                    f"{name} of iteration {self.info.state.iteration} is not stored exactly once: {defect}; "
                    "every rectangle must come from exactly one rank. Use another checkpoint."
                )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    body = json.dumps(_to_json(manifest), indent=1, allow_nan=False)[1:].encode()
    with open(folder / MANIFEST_FILE, "xb") as file:
        file.write(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError when the manifest is missing, damaged, of another version, or leaves gaps."""
    path = folder / MANIFEST_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(
            f"{path} cannot be read ({error.strerror}): without it {folder} is no complete checkpoint; "
            "load another iteration with --load_iters."
        ) from error
    first_line, _, body = content.partition(b"\n")
    if first_line != b'{"crc32": "%08x",' % zlib.crc32(body):
        raise DamagedCheckpointError(
            f"{path} is damaged: its content does not have the checksum of its first line; "
            "restore the file or load another iteration with --load_iters."
        )
    try:
        fields = json.loads(content)
        if fields["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {fields['format_version']}, this program reads version {FORMAT_VERSION}; "
                "use the program that wrote it."
            )
        manifest = _from_json(fields, path)
        manifest.check_tiling()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{path} was edited: it has the checksum of its first line, and is no manifest ({error!r}); "
            "restore the file or load another iteration with --load_iters."
        ) from error
    return manifest


def _to_json(manifest: Manifest) -> dict[str, JSON]:
    return {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(manifest.info),
        "files": {
            name: {
                "num_bytes": record.num_bytes,
                "header_bytes": record.header_bytes,
                "header_crc32": record.header_crc32,
                "tiles": {
                    key: {"rows": tiles.rows, "columns": tiles.columns, "crc32": tiles.crc32.hex(" ", 4)}
                    for key, tiles in record.tiles.items()
                },
            }
            for name, record in sorted(manifest.files.items())
        },
        "entries": {
            name: {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": entry.shape,
                "pieces": [
                    {"file": p.file, "key": p.key, "start": p.rectangle.start, "size": p.rectangle.size}
                    for p in entry.pieces
                ],
            }
            for name, entry in sorted(manifest.entries.items())
        },
    }


def _from_json(fields: Mapping[str, Any], path: Path) -> Manifest:
    return Manifest(
        entries={name: _entry(entry) for name, entry in fields["entries"].items()},
        files={name: _file_record(record) for name, record in fields["files"].items()},
        info=CheckpointInfo(
            state=_build(RunState, fields["state"], path),
            model=_model_config(fields["model"], path),
            model_name=fields["model_name"],
            tokenizer=None if fields["tokenizer"] is None else _build(TokenizerIdentity, fields["tokenizer"], path),
        ),
    )


def _entry(fields: Mapping[str, Any]) -> Entry:
    pieces = (Piece(p["file"], p["key"], Rectangle(tuple(p["start"]), tuple(p["size"]))) for p in fields["pieces"])
    return Entry(DTYPES[fields["dtype"]], tuple(fields["shape"]), tuple(pieces))


def _file_record(fields: Mapping[str, Any]) -> FileRecord:
    tiles = {
        key: Tiles(held["rows"], held["columns"], bytes.fromhex(held["crc32"])) for key, held in fields["tiles"].items()
    }
    return FileRecord(**{**fields, "tiles": tiles})


def _model_config(fields: Mapping[str, Any], path: Path) -> ModelConfig:
    scaling = fields["rope_scaling"]
    scaling = None if scaling is None else _build(RopeScaling, scaling, path)
    return _build(ModelConfig, {**fields, "rope_scaling": scaling}, path)


def _build(kind: type[T], fields: Mapping[str, Any], path: Path) -> T:
    """Fields that are not stored take their defaults; one that is stored and unknown must not be lost silently."""
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
    if unknown:
        raise CheckpointError(
            f"{path} gives {', '.join(unknown)} for {kind.__name__}, which this program does not know; "
            "use the program that wrote it."
        )
    return kind(**fields)
