"""The whole configuration of a run, resolved: nothing is left to be inferred."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import yaml

from megatron.config.parallel import ParallelConfig
from megatron.config.training import CheckpointConfig, LoggingConfig, TrainingConfig
from megatron.core.layout import ParallelLayout
from megatron.data.config import DataConfig
from megatron.model.config import ModelConfig
from megatron.optimizer.config import OptimizerConfig
from megatron.tokenizer.config import TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One owner's configuration a field, and the number of processes it was resolved for."""

    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    world_size: int

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout.infer(
            self.world_size,
            tp=self.parallel.tensor_model_parallel_size,
            pp=self.parallel.pipeline_model_parallel_size,
        )

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that each data-parallel rank runs in one step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.layout.dp)

    @property
    def num_stages_per_rank(self) -> int:
        """Pipeline stages on each pipeline rank: 1, or more when interleaved."""
        return self.parallel.num_stages_per_rank(self.model.num_layers)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor ranks, of which the last ones belong to no token."""
        multiple = self.training.make_vocab_size_divisible_by * self.parallel.tensor_model_parallel_size
        return -(-self.model.vocab_size // multiple) * multiple

    @property
    def notes(self) -> tuple[str, ...]:
        """What the start-up summary says of options that do less than their name."""
        notes = []
        if self.parallel.sequence_parallel and self.layout.tp == 1:
            notes.append("--sequence_parallel changes nothing at --tensor_model_parallel_size 1")
        if self.parallel.zero_stage and self.layout.dp == 1:
            notes.append(f"--zero_stage {self.parallel.zero_stage} shards nothing: there is one data-parallel process")
        if self.checkpoint.save is None:
            notes.append("no --save: nothing of this run is kept")
        return tuple(notes)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Sections of JSON values."""
        sections = dataclasses.asdict(self)
        del sections["world_size"]
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
            for name, section in sections.items()
        }

    def to_yaml(self) -> str:
        """A file that ``--config`` reads; with the same number of processes it resolves to this configuration."""
        header = f"# Resolved for {self.world_size} processes: {self.layout}, {self.num_microbatches} micro-batches\n"
        return header + yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)
