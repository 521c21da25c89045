"""A checkpoint of this project, read as a source."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.checkpoint.plan import Rectangle, parts_of
from megatron.checkpoint.source import RunState, TokenizerIdentity
from megatron.checkpoint.verified_file import VerifiedFile
from megatron.model.config import ModelConfig

# Each open file keeps some tiles, so this bounds the memory and the descriptors of a thread that reads.
_MAX_OPEN_FILES = 16


class NativeSource:
    """Reads an iteration's folder; see `Source`. The manifest is verified at once, tiles when they are read."""

    def __init__(self, path: Path):
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        # Threads read in different places: each keeps the last tiles of its own.
        self._of_thread = threading.local()

    def names(self) -> Sequence[str]:
        return list(self.manifest.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.manifest.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.manifest.entries[name].dtype

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        entry = self.manifest.entries[name]
        wanted = Rectangle(tuple(start), tuple(size))
        out = torch.empty(wanted.size, dtype=entry.dtype)
        for part in parts_of(wanted, [piece.rectangle for piece in entry.pieces]):
            piece = entry.pieces[part.piece]
            stored_at = Rectangle(
                tuple(a - b for a, b in zip(part.rectangle.start, piece.rectangle.start, strict=True)),
                part.rectangle.size,
            )
            self._file(piece.file).read(piece.key, stored_at, out[part.rectangle.slices_in(wanted)])
        return out

    def model_config(self) -> ModelConfig:
        return self.manifest.info.model

    def model_name(self) -> str | None:
        return self.manifest.info.model_name

    def tokenizer(self) -> TokenizerIdentity | None:
        return self.manifest.info.tokenizer

    def state(self) -> RunState | None:
        return self.manifest.info.state

    def _file(self, name: str) -> VerifiedFile:
        files: OrderedDict[str, VerifiedFile] = self._of_thread.__dict__.setdefault("files", OrderedDict())
        if name not in files:
            files[name] = VerifiedFile(self.path, name, self.manifest.files[name])
            if len(files) > _MAX_OPEN_FILES:
                files.popitem(last=False)
        files.move_to_end(name)
        return files[name]
