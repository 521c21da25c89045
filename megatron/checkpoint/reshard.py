"""Any source -> a checkpoint with one file for each rank of a target layout, optimizer state included.

Rows are read and written a few at a time, so that memory depends neither on the model nor on its largest tensor.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron.checkpoint.commit import check_room, check_save_folder, commit
from megatron.checkpoint.hf import carried_files
from megatron.checkpoint.locate import iteration_folder, list_folders
from megatron.checkpoint.manager import file_name
from megatron.checkpoint.ownership import owned
from megatron.checkpoint.placement import regions_of_rank
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.source import MODEL, CheckpointInfo, RunState, Source, TokenizerIdentity
from megatron.checkpoint.storage import PlannedPiece
from megatron.checkpoint.streaming import write_files
from megatron.checkpoint.tokenizer_copy import copy_tokenizer
from megatron.checkpoint.tokenizer_files import SENTENCEPIECE_FILE, TOKENIZER_FOLDER, identity_of
from megatron.checkpoint.tokenizer_source import files_beside
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Region
from megatron.core.topology import Axis
from megatron.errors import CheckpointError, listed


@dataclass(frozen=True)
class Resharding:
    """What will be written: the pieces of each file, by file name. Made by `plan_resharding`, done by `reshard`."""

    source: Source
    files: Mapping[str, tuple[PlannedPiece, ...]]
    kinds: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for pieces in self.files.values() for piece in pieces)


def has_optimizer_state(source: Source) -> bool:
    return any(not name.startswith(f"{MODEL}.") for name in source.names())


def plan_resharding(
    source: Source,
    layout: ParallelLayout,
    *,
    num_chunks: int = 1,
    weights_dtype: torch.dtype | None = None,
) -> Resharding:
    """Decides what each rank of `layout` (without data parallelism) gets, with `num_chunks` stages a pipeline rank;
    reads names and shapes only.

    Raises CheckpointError where the source does not hold exactly its model, and ConfigError where the model cannot be
    laid out so.
    """
    model = source.model_config()
    regions = {
        rank: list(regions_of_rank(model, layout, rank, num_chunks=num_chunks)) for rank in range(layout.world_size)
    }
    shapes = {region.name: region.global_shape for held in regions.values() for region in held}
    kinds = _kinds(source, shapes)
    stored = set(source.names())

    def planned(entry: str, region: Region) -> PlannedPiece:
        is_weight = entry.startswith(f"{MODEL}.")
        dtype = weights_dtype if weights_dtype is not None and is_weight else source.dtype(entry)
        return PlannedPiece(entry, source.shape(entry), dtype, Rectangle(region.start, region.size), region.cut)

    files = {
        file_name(rank): tuple(
            planned(f"{kind}.{region.name}", region)
            for region in held
            for kind in kinds
            if region.copy == 0 and f"{kind}.{region.name}" in stored
        )
        for rank, held in regions.items()
    }
    return Resharding(source, {name: pieces for name, pieces in files.items() if pieces}, kinds)


def reshard(
    plan: Resharding,
    root: Path,
    *,
    model_name: str | None = None,
    num_workers: int = 1,
    on_bytes: Callable[[int], object],
) -> Path:
    """Writes the planned checkpoint as the source's iteration (0 for one without) under `root`; returns its folder.

    `model_name` is recorded if the source records none. `on_bytes` hears of bytes when they have been written. A
    tokenizer that lies with the source is copied to ``root/tokenizer``. The files do not depend on `num_workers`.
    Raises CheckpointError if `root` has that iteration already, or another tokenizer, or belongs to another process.
    """
    source = plan.source
    state = source.state() or RunState(iteration=0, config=carried_files(source))
    name = source.model_name() or model_name
    check_save_folder(root)
    check_room(root, plan.num_bytes)
    with owned(root):
        _check_new(root, state.iteration)
        with _tokenizer_carried(source, root) as tokenizer:
            return commit(
                root,
                CheckpointInfo(state, source.model_config(), name, tokenizer),
                lambda folder: write_files(source, folder, plan.files, num_workers=num_workers, on_bytes=on_bytes),
                Axis("world"),
                expected=source.names(),
                is_owned=True,
            )


def _check_new(root: Path, iteration: int) -> None:
    """A run replaces an iteration of its own when it comes to it again; a conversion would replace somebody else's."""
    if iteration in list_folders(root):
        raise CheckpointError(
            f"{iteration_folder(root, iteration)} exists, and a conversion replaces nothing; "
            "choose another folder to save to, or move that one away."
        )


@contextmanager
def _tokenizer_carried(source: Source, root: Path) -> Iterator[TokenizerIdentity | None]:
    """Copies the source's own tokenizer, so that the new checkpoint does not depend on the old folder; a failure
    inside takes the copy away again.
    """
    files, target = files_beside(source), root / TOKENIZER_FOLDER
    is_new = not target.exists()
    try:
        copy_tokenizer(files, target, may_replace=False)
        yield _identity_of_copy(source.tokenizer(), target) if files else source.tokenizer()
    except BaseException:
        if is_new:
            shutil.rmtree(target, ignore_errors=True)
        raise


def _identity_of_copy(recorded: TokenizerIdentity | None, target: Path) -> TokenizerIdentity | None:
    """What was recorded, in its new place: another file in the place of the recorded one is still found."""
    held = identity_of(target)
    if recorded is None:
        return held
    if held is not None and held.tokenizer_type == recorded.tokenizer_type:
        return replace(held, sha256=recorded.sha256 or held.sha256)
    lone = target / SENTENCEPIECE_FILE
    place = lone if recorded.tokenizer_type == "SentencePieceTokenizer" and lone.is_file() else target
    return replace(recorded, tokenizer_model=str(place.absolute()))


def _kinds(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The kinds of entries there are. Raises CheckpointError unless the weights are complete and all entries known."""
    kinds: set[str] = set()
    stored = source.names()
    problems = [f"{entry} is missing" for entry in sorted({f"{MODEL}.{name}" for name in shapes} - set(stored))]
    for entry in stored:
        parts = entry.split(".")
        tails = (".".join(parts[i:]) for i in range(1, len(parts)))
        logical = next((tail for tail in tails if tail in shapes), None)
        if logical is None:
            problems.append(f"{entry} is no tensor of the model")
        elif source.shape(entry) != shapes[logical]:
            problems.append(f"{entry} has shape {list(source.shape(entry))}, not {list(shapes[logical])}")
        else:
            kinds.add(entry.removesuffix(f".{logical}"))
    if problems:
        raise CheckpointError(
            f"{source.path} does not hold the model it describes: {listed(problems)}. Use a complete checkpoint."
        )
    return tuple(sorted(kinds))
