"""Saving and loading as a run does it: every rank calls these together.

Whatever layout saved, any layout loads: ranks hand in `LocalTensor`s and speak of rectangles only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron.checkpoint.agreement import on_every_rank, on_first_rank
from megatron.checkpoint.commit import commit
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.retention import Retention, remove_old
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, Source, load_tensors
from megatron.checkpoint.storage import OutgoingPiece, write_file
from megatron.checkpoint.tiles import TILE_BYTES
from megatron.core.sharding import Region
from megatron.core.topology import Axis
from megatron.errors import CheckpointError
from megatron.model.config import ModelConfig

# These shape neither the parameters nor the function that is evaluated.
TRAINING_FIELDS = frozenset({"hidden_dropout", "attention_dropout", "init_method_std"})


def save(
    root: Path,
    info: CheckpointInfo,
    tensors: Sequence[LocalTensor],
    world: Axis,
    *,
    tile_bytes: int = TILE_BYTES,
    is_owned: bool = False,
    retention: Retention | None = None,
) -> Path:
    """Writes ``root/iter_XXXXXXX`` from what all ranks hand in, and returns it when it is complete and durable.

    Each element is handed in by exactly one rank as copy 0: data-parallel replicas pass disjoint row shards, or one of
    them passes everything. An existing checkpoint of the same iteration is replaced once the new one is complete.
    Then older ones are removed as `retention` says. With `is_owned` the caller holds `root` (`owned`).
    Raises CheckpointError on all ranks alike; nothing of the failed checkpoint stays.
    """
    pieces = [_outgoing(t, region) for t in tensors for region in t.regions if region.copy == 0]
    folder = commit(
        root,
        info,
        lambda folder: [write_file(folder / file_name(world.rank), pieces, tile_bytes=tile_bytes)] if pieces else [],
        world,
        expected={local.entry(region) for local in tensors for region in local.regions},
        num_bytes=sum(piece.num_bytes for piece in pieces),
        is_owned=is_owned,
    )
    if retention is not None:
        on_first_rank(world, lambda: remove_old(folder, retention))
    return folder


def load(source: Source, tensors: Sequence[LocalTensor], world: Axis, *, narrow: bool = False) -> None:
    """`load_tensors` on every rank; all raise CheckpointError if one finds damage, and nobody goes on alone."""
    on_every_rank(world, lambda: load_tensors(source, tensors, narrow=narrow))


def check_architecture(
    path: Path, saved: ModelConfig, model: ModelConfig, *, may_differ: Collection[str] = TRAINING_FIELDS
) -> None:
    """Raises one CheckpointError that lists every field in which the two differ.

    With rotary positions the longest sequence is not part of the weights, so that it may always differ.
    """
    ignored = set(may_differ)
    if saved.position_embedding_type == model.position_embedding_type == "rotary":
        ignored.add("max_position_embeddings")
    differences = [
        f"{field.name} is {getattr(saved, field.name)} in the checkpoint and {getattr(model, field.name)} in the run"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in ignored and getattr(saved, field.name) != getattr(model, field.name)
    ]
    if differences:
        raise CheckpointError(
            f"{path} holds another architecture: {'; '.join(differences)}. "
            "Give the checkpoint's values, or --use_checkpoint_args to take them from it."
        )


def file_name(rank_in_world: int) -> str:
    return f"rank_{rank_in_world:05d}.safetensors"


def _outgoing(local: LocalTensor, region: Region) -> OutgoingPiece:
    return OutgoingPiece(
        entry=local.entry(region),
        shape=region.global_shape,
        dtype=local.tensor.dtype,
        rectangle=Rectangle(region.start, region.size),
        cut=region.cut,
        read=lambda: local.tensor[region.local_slices],
    )
