"""A source seen with another number of vocabulary rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.placement import specs_of_rank
from megatron.checkpoint.source import MODEL, RunState, Source, TokenizerIdentity, row_chunks
from megatron.core.layout import ParallelLayout
from megatron.model.config import ModelConfig


class ResizedVocabulary:
    """A `Source` that cuts the rows of tokens from `vocab_size` on, or adds rows that behave like an average token.

    A new row is the mean of the stored ones: a new token then starts with an average logit, where a random row could
    take probability from every trained token (Hewitt 2021, "Initializing new word embeddings for pretrained language
    models"). New rows of optimizer moments are zero.
    """

    def __init__(self, source: Source, vocab_size: int):
        self._source = source
        self._model = dataclasses.replace(source.model_config(), vocab_size=vocab_size)
        # A vocabulary tensor is one that the model pads.
        self._resized = {
            block.name
            for spec in specs_of_rank(self._model, ParallelLayout(), 0)
            for block in spec.blocks
            if block.padded_units is not None
        }
        self._means: dict[str, Tensor] = {}

    @property
    def path(self) -> Path:
        return self._source.path

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._source.shape(name)
        return (self._model.vocab_size, *stored[1:]) if self._is_resized(name) else stored

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        if not self._is_resized(name):
            return self._source.read(name, start, size)
        num_old = min(size[0], max(0, self._source.shape(name)[0] - start[0]))
        rows = torch.zeros(*size, dtype=self.dtype(name))
        if num_old:
            rows[:num_old] = self._source.read(name, start, (num_old, *size[1:]))
        if num_old < size[0] and name.startswith(f"{MODEL}."):
            columns = tuple(slice(a, a + n) for a, n in zip(start[1:], size[1:], strict=True))
            rows[num_old:] = self._mean_row(name)[columns]
        return rows

    def model_config(self) -> ModelConfig:
        return self._model

    def model_name(self) -> str | None:
        return self._source.model_name()

    def tokenizer(self) -> TokenizerIdentity | None:
        return self._source.tokenizer()

    def state(self) -> RunState | None:
        return self._source.state()

    def _is_resized(self, name: str) -> bool:
        return any(name.endswith(f".{logical}") for logical in self._resized)

    def _mean_row(self, name: str) -> Tensor:
        if name not in self._means:
            shape = self._source.shape(name)
            chunks = row_chunks(self._source, name, (0,) * len(shape), shape)
            total = sum((chunk.double().sum(dim=0) for chunk in chunks), torch.zeros(shape[1:], dtype=torch.float64))
            self._means[name] = (total / shape[0]).to(self.dtype(name))
        return self._means[name]
