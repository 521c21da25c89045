"""Which rectangles of a model each rank of a layout holds, asked of the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from megatron.core.layout import ParallelLayout, place_layers
from megatron.core.pipeline.actions import Placement
from megatron.core.sharding import Region, ShardSpec
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Axis
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.model.flops import head_cost_in_layers
from megatron.model.stage import Stage, StageOptions

# The default of --make_vocab_size_divisible_by. Padding is not stored; it only decides which rank holds which rows.
_VOCABULARY_MULTIPLE = 128


def specs_of_rank(model: ModelConfig, layout: ParallelLayout, rank: int, *, num_chunks: int = 1) -> Sequence[ShardSpec]:
    """The specs of all parameters of `rank`, which holds `num_chunks` stages, as training deals them out.

    Raises ConfigError if the model cannot be laid out so.
    """
    here = layout.coordinate(rank)
    placement = Placement.loop(layout.pp, num_chunks)
    # Training counts the head where stages need not be alike.
    uneven = placement.num_stages > 1 and num_chunks == 1
    layers = place_layers(
        model.num_layers, placement.num_stages, head_cost=head_cost_in_layers(model) if uneven else 0.0
    )
    multiple = _VOCABULARY_MULTIPLE * layout.tp
    options = StageOptions(padded_vocab_size=-(-model.vocab_size // multiple) * multiple)
    specs: list[ShardSpec] = []
    for number in placement.stages_of(here.pp):
        with torch.device("meta"):
            stage = Stage(
                model,
                layers[number],
                is_first=number == 0,
                is_last=number == placement.num_stages - 1,
                axis=Axis("tp", layout.tp, here.tp),
                options=options,
            )
        specs += shard_specs(stage).values()
    return specs


def regions_of_rank(model: ModelConfig, layout: ParallelLayout, rank: int, *, num_chunks: int = 1) -> Iterator[Region]:
    """The rectangles that `rank` holds, copies included."""
    tp = layout.coordinate(rank).tp
    for spec in specs_of_rank(model, layout, rank, num_chunks=num_chunks):
        yield from spec.regions(tp, layout.tp)


def num_virtual_chunks(model: ModelConfig, layout: ParallelLayout, layers_per_stage: int | None) -> int:
    """Stages that each pipeline rank holds if every stage has `layers_per_stage` layers; 1 for None.

    Raises ConfigError where the layers cannot be dealt out so.
    """
    if layers_per_stage is None:
        return 1
    flag = f"--target_num_layers_per_virtual_pipeline_stage {layers_per_stage}"
    if layers_per_stage < 1:
        raise ConfigError(f"{flag} is not a positive number; use 1 or more.")
    if layout.pp == 1:
        raise ConfigError(f"{flag}: one pipeline rank has no virtual stages; raise --target_pipeline_parallel_size.")
    per_round = layers_per_stage * layout.pp
    if model.num_layers % per_round:
        raise ConfigError(
            f"{flag}: {model.num_layers} layers cannot be dealt out to {layout.pp} pipeline ranks in such stages, "
            f"because they are not a multiple of {per_round}; choose another size."
        )
    return model.num_layers // per_round


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every logical tensor of a model, as the model itself declares them, first layer first."""
    specs = specs_of_rank(model, ParallelLayout(), 0)
    return {block.name: block.global_shape for spec in specs for block in spec.blocks}
