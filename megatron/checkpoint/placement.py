"""Which rectangles of a model each rank of a layout holds, asked of the model itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron.core.layout import ParallelLayout, place_layers
from megatron.core.sharding import ShardSpec
from megatron.core.tensor_parallel import shard_specs
from megatron.core.topology import Axis
from megatron.model.config import ModelConfig
from megatron.model.stage import Stage, StageOptions

# The default of --make_vocab_size_divisible_by. Padding is not stored; it only decides which rank holds which rows.
_VOCABULARY_MULTIPLE = 128


def specs_of_rank(model: ModelConfig, layout: ParallelLayout, rank: int) -> Sequence[ShardSpec]:
    """The specs of all parameters of `rank`. Raises ConfigError if the model cannot be laid out so."""
    here = layout.coordinate(rank)
    multiple = _VOCABULARY_MULTIPLE * layout.tp
    with torch.device("meta"):
        stage = Stage(
            model,
            place_layers(model.num_layers, layout.pp)[here.pp],
            is_first=here.pp == 0,
            is_last=here.pp == layout.pp - 1,
            axis=Axis("tp", layout.tp, here.tp),
            options=StageOptions(padded_vocab_size=-(-model.vocab_size // multiple) * multiple),
        )
    return list(shard_specs(stage).values())
