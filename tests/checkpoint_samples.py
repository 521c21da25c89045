"""A small model as the checkpoint sees it: specs, whole tensors, and what each rank of a layout holds of them.

Fused q | k | v with two key/value heads (copies above two tensor ranks), a cut along columns, vocabulary rows that
pad, parameters held by all ranks, and five layers, which no number of stages but 1 and 5 divides.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.commit import commit
from megatron.checkpoint.manifest import FileRecord
from megatron.checkpoint.plan import Rectangle
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, RunState, TokenizerIdentity
from megatron.checkpoint.storage import OutgoingPiece, write_file
from megatron.core.layout import ParallelLayout, place_layers
from megatron.core.sharding import Block, ShardSpec
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig

HIDDEN, HEADS, HEADS_KV, HEAD_DIM, VOCAB = 24, 8, 2, 4, 103
KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
CONFIG = ModelConfig(
    num_layers=5,
    hidden_size=HIDDEN,
    num_attention_heads=HEADS,
    num_attention_heads_kv=HEADS_KV,
    kv_channels=HEAD_DIM,
    ffn_hidden_size=32,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    tie_embed_logits=False,
)
INFO = CheckpointInfo(
    state=RunState(
        iteration=10,
        consumed_samples=40,
        seed=7,
        optimizer={"step": 10},
        scheduler={"position": 10},
        data={"train": 99},
    ),
    model=CONFIG,
    model_name="llama2",
    tokenizer=TokenizerIdentity("NullTokenizer", "", None),
)


def stage_specs(pp_rank: int, pp_size: int, tp_size: int) -> Iterator[ShardSpec]:
    padded = -(-VOCAB // (8 * tp_size)) * 8 * tp_size
    if pp_rank == 0:
        yield ShardSpec((Block("embedding.word.weight", (VOCAB, HIDDEN), VOCAB, padded),), dim=0)
    for layer in place_layers(CONFIG.num_layers, pp_size)[pp_rank]:
        yield from _layer_specs(f"layers.{layer}")
    if pp_rank == pp_size - 1:
        yield ShardSpec((Block("final_norm.weight", (HIDDEN,)),))
        yield ShardSpec((Block("head.weight", (VOCAB, HIDDEN), VOCAB, padded),), dim=0)


def _layer_specs(layer: str) -> Iterator[ShardSpec]:
    q = Block(f"{layer}.attention.q.weight", (HEADS * HEAD_DIM, HIDDEN), HEADS)
    k, v = (Block(f"{layer}.attention.{x}.weight", (HEADS_KV * HEAD_DIM, HIDDEN), HEADS_KV) for x in "kv")
    yield ShardSpec((q, k, v), dim=0)
    yield ShardSpec((Block(f"{layer}.attention.out.weight", (HIDDEN, HEADS * HEAD_DIM), HEADS),), dim=1)
    yield ShardSpec((Block(f"{layer}.norm.weight", (HIDDEN,)),))


def whole_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every entry of the model and its optimizer, as a function of its name."""
    names = {block.name: block.global_shape for spec in stage_specs(0, 1, 1) for block in spec.blocks}
    return {
        f"{kind}.{name}": _random(f"{kind}.{name}", shape, dtype) for kind in KINDS for name, shape in names.items()
    }


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).to(dtype)


def held_by(layout: ParallelLayout, rank: int, whole: Mapping[str, Tensor], *, by_rows: bool) -> list[LocalTensor]:
    """What `rank` hands in: with `by_rows` its rows of each local tensor, else everything on the first replica."""
    here = layout.coordinate(rank)
    held = []
    for spec in stage_specs(here.pp, layout.pp, layout.tp):
        rows = -(-spec.local_shape(layout.tp)[0] // layout.dp)
        for kind in KINDS:
            local = spec.take({b.name: whole[f"{kind}.{b.name}"] for b in spec.blocks}, here.tp, layout.tp)
            if by_rows:
                regions = spec.regions(here.tp, layout.tp, here.dp, layout.dp)
                held.append(LocalTensor(kind, regions, local[here.dp * rows : (here.dp + 1) * rows]))
            elif here.dp == 0:
                held.append(LocalTensor(kind, spec.regions(here.tp, layout.tp), local))
    return held


def save_from_one_process(
    root: Path,
    layout: ParallelLayout,
    *,
    by_rows: bool = False,
    tile_bytes: int = 512,
    info: CheckpointInfo = INFO,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The files all ranks of `layout` would write, written one after another."""
    whole = whole_tensors(dtype)

    def write(folder: Path):
        written = []
        for rank in range(layout.world_size):
            pieces = [
                OutgoingPiece(
                    held.entry(region),
                    region.global_shape,
                    dtype,
                    Rectangle(region.start, region.size),
                    region.cut,
                    lambda held=held, region=region: held.tensor[region.local_slices],
                )
                for held in held_by(layout, rank, whole, by_rows=by_rows)
                for region in held.regions
                if region.copy == 0
            ]
            if pieces:
                written.append(write_file(folder / f"rank_{rank:05d}.safetensors", pieces, tile_bytes=tile_bytes))
        return written

    return commit(root, info, write, Axis("world"), expected=whole.keys())


def tiles_of_bytes(folder: Path, name: str, record: FileRecord) -> list[tuple[str, int, int]]:
    """Of each byte of a file's data section: its tensor, and which group of rows and which strip of them it lies in."""
    header = (folder / name).read_bytes()[: record.header_bytes]
    found: list[tuple[str, int, int]] = []
    for key, fields in sorted(json.loads(header[8:]).items(), key=lambda item: item[1]["data_offsets"]):
        first, end = fields["data_offsets"]
        assert first == len(found)
        num_rows = fields["shape"][0] if fields["shape"] else 1
        for byte in range(end - first):
            row, column = divmod(byte, (end - first) // num_rows)
            found.append((key, row // record.tiles[key].rows, column // record.tiles[key].columns))
    return found


def blank_like(held: list[LocalTensor]) -> list[LocalTensor]:
    """The same places with zeros in them: what a rank has before it loads (padding is zero)."""
    return [LocalTensor(local.kind, local.regions, torch.zeros_like(local.tensor)) for local in held]
