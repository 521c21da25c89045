"""What a tree for Megatron-LLM will hold, decided before anything is read or written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from megatron.checkpoint.hf_export import dtype_of_run, half_precision
from megatron.checkpoint.legacy.conventions import Conventions
from megatron.checkpoint.legacy.tensors import Chunk, StoredTensor, TreeModel
from megatron.checkpoint.legacy.tree import MODEL_FILES, RELEASE, rank_name
from megatron.checkpoint.locate import iteration_folder
from megatron.checkpoint.source import MODEL, Source
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError, ConfigError
from megatron.model.config import ModelConfig

_MAX_LISTED: Final = 8
_OF_BERT: Final = ("bidirectional", "use_post_ln", "embedding_layernorm", "num_token_types", "bert_head")


@dataclass(frozen=True)
class LegacyTreePlan:
    """What will be written. Made by `plan_legacy_tree`, done by `write_legacy_tree`. `name` is that of its folder."""

    source: Source
    layout: ParallelLayout
    num_chunks: int
    stored_as: TreeModel
    vocabulary_multiple: int
    weights_dtype: torch.dtype | None
    model_name: str | None

    @property
    def name(self) -> str:
        state = self.source.state()
        return RELEASE if state is None or state.iteration == 0 else iteration_folder(Path(), state.iteration).name

    @property
    def program(self) -> str:
        """Which one the tree is for."""
        return "Megatron-LM" if self.stored_as.model.bert_head else "Megatron-LLM"

    @property
    def files(self) -> dict[str, int]:
        """The bytes of the tensors in each file, whose name is relative to the tree's folder."""
        return {
            f"{rank_name(p, t, self.layout.pp)}/{MODEL_FILES[0]}": self._rank_bytes(p)
            for p in range(self.layout.pp)
            for t in range(self.layout.tp)
        }

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())

    def chunks(self, pipeline_rank: int) -> list[Chunk]:
        """Those of one pipeline rank. As in the programs that load it, all chunks have as many layers."""
        num_stages = self.layout.pp * self.num_chunks
        size = self.stored_as.model.num_layers // num_stages
        stages = range(pipeline_rank, num_stages, self.layout.pp)
        return [Chunk(range(s * size, (s + 1) * size), s == 0, s == num_stages - 1) for s in stages]

    def dtype(self, stored: StoredTensor) -> torch.dtype:
        return self.weights_dtype or self.source.dtype(f"{MODEL}.{stored.parts[0].name}")

    def _rank_bytes(self, pipeline_rank: int) -> int:
        return sum(
            math.prod(stored.local_shape(self.layout.tp)) * self.dtype(stored).itemsize
            for chunk in self.chunks(pipeline_rank)
            for stored in self.stored_as.tensors(chunk)
        )


def plan_legacy_tree(
    source: Source,
    layout: ParallelLayout,
    *,
    num_chunks: int = 1,
    weights_dtype: torch.dtype | None = None,
    vocabulary_multiple: int = 128,
    model_name: str | None = None,
) -> LegacyTreePlan:
    """Decides what each rank gets, with `num_chunks` virtual stages a pipeline rank; reads names and shapes only.

    `vocabulary_multiple` is --make_vocab_size_divisible_by of the run that will load the tree. `model_name` is
    recorded if the source records none. Without `weights_dtype`, master weights become what their run computed in, as
    in an export to Hugging Face. Raises ConfigError where the model cannot be cut so, and CheckpointError
    unless the source holds all of it.
    """
    model = source.model_config()
    _check_block(source.path, model)
    _check_layout(model, layout, num_chunks)
    multiple = vocabulary_multiple * layout.tp
    padded = -(-model.vocab_size // multiple) * multiple
    # A BERT is for Megatron-LM, all others are for Megatron-LLM.
    conventions = Conventions(rotary_pairs=True, gate_first=model.bert_head)
    stored_as = TreeModel(model, conventions, layout.tp, padded)
    name = source.model_name() or model_name
    dtype = weights_dtype or half_precision(dtype_of_run(source))
    plan = LegacyTreePlan(source, layout, num_chunks, stored_as, vocabulary_multiple, dtype, name)
    _check_complete(plan)
    return plan


def _check_block(path: Path, model: ModelConfig) -> None:
    of_bert = {name: getattr(model, name) for name in _OF_BERT}
    if any(of_bert.values()) and not all(of_bert.values()):
        has, lacks = ([name for name, value in of_bert.items() if bool(value) is held] for held in (True, False))
        raise CheckpointError(
            f"{path} holds a model with {', '.join(has)} and without {', '.join(lacks)}; a tree holds a decoder, which "
            "has none of these, or a BERT, which has all. Use --saver megatron."
        )


def _check_layout(model: ModelConfig, layout: ParallelLayout, num_chunks: int) -> None:
    for name in ("num_attention_heads_kv", "ffn_hidden_size"):
        if getattr(model, name) % layout.tp:
            raise ConfigError(
                f"--target_tensor_parallel_size {layout.tp}: Megatron-LLM cannot cut {name} "
                f"{getattr(model, name)} so; use a divisor of it."
            )
    if model.num_layers % (layout.pp * num_chunks):
        virtual = f" of {num_chunks} virtual stages each" if num_chunks > 1 else ""
        raise ConfigError(
            f"--target_pipeline_parallel_size {layout.pp}: Megatron-LLM's pipeline ranks{virtual} have equally many "
            f"layers, and {model.num_layers} cannot be dealt out so; use a divisor."
        )


def _check_complete(plan: LegacyTreePlan) -> None:
    chunks = [chunk for p in range(plan.layout.pp) for chunk in plan.chunks(p)]
    parts = (part for chunk in chunks for stored in plan.stored_as.tensors(chunk) for part in stored.parts)
    expected = {f"{MODEL}.{part.name}" for part in parts}
    stored = {name for name in plan.source.names() if name.startswith(f"{MODEL}.")}
    problems = [f"{name} is missing" for name in sorted(expected - stored)]
    problems += [f"{name} has no place in a tree" for name in sorted(stored - expected)]
    if problems:
        more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        raise CheckpointError(
            f"{plan.source.path} cannot be a tree of {plan.program}: {'; '.join(problems[:_MAX_LISTED])}{more}. "
            "Use a complete checkpoint."
        )
