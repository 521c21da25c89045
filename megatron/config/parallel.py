"""How the model and its training state are spread over the processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the tensor and pipeline axes, and what is sharded, scheduled and recomputed how.

    The data-parallel size is inferred from the number of processes. Options left at None are derived from the others
    in `__post_init__` and are never None afterwards, but for those whose type says so.
    """

    tensor_model_parallel_size: int = field(
        default=1, metadata={"help": "processes over which every layer is cut (TP)"}
    )
    pipeline_model_parallel_size: int = field(
        default=1, metadata={"help": "processes over which the layers are dealt out (PP)"}
    )
    sequence_parallel: bool = field(
        default=False, metadata={"help": "cut the sequence over the tensor axis between the layers' matmuls as well"}
    )
    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved"] = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "order of the micro-batches; default: 1f1b, or interleaved with"
            " --num_layers_per_virtual_pipeline_stage"
        },
    )
    num_layers_per_virtual_pipeline_stage: int | None = field(
        default=None,
        metadata={"help": "interleaved: layers of a stage, of which each process holds several; shrinks the bubble"},
    )
    zero_stage: Literal[0, 1, 2, 3] = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "what data-parallel processes shard instead of repeating it: 1 optimizer state, 2 gradients too, "
            "3 weights too; default: 0, or 1 with --use_distributed_optimizer"
        },
    )
    use_distributed_optimizer: bool = field(default=False, metadata={"help": "the same as --zero_stage 1"})
    recompute_granularity: Literal["selective", "full"] | None = field(
        default=None,
        metadata={"help": "compute again in the backward pass: the attention cores, or whole layers; default: nothing"},
    )
    recompute_method: Literal["uniform", "block"] | None = field(
        default=None,
        metadata={
            "help": "full: groups of recompute_num_layers layers keep only their input (uniform), or only the first "
            "recompute_num_layers layers of a stage are recomputed (block); default: uniform"
        },
    )
    recompute_num_layers: int = field(
        default=1, metadata={"help": "full: see --recompute_method; with ZeRO-3 a uniform group is gathered together"}
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for options that contradict each other."""
        self._check_sizes()
        self._derive_schedule()
        self._derive_zero_stage()
        self._derive_recompute_method()

    def num_stages_per_rank(self, num_layers: int) -> int:
        """Stages that each pipeline rank holds: 1, or more when interleaved.

        Raises ConfigError where the layers cannot be dealt out in stages of the asked size.
        """
        stage_layers, pp = self.num_layers_per_virtual_pipeline_stage, self.pipeline_model_parallel_size
        if stage_layers is None:
            return 1
        if num_layers % (stage_layers * pp):
            raise ConfigError(
                f"--num_layers {num_layers} cannot be dealt out to {pp} pipeline ranks in stages of "
                f"--num_layers_per_virtual_pipeline_stage {stage_layers}: {num_layers} is not a multiple of "
                f"{stage_layers * pp}; choose another size, or --pipeline_schedule 1f1b, which allows uneven stages."
            )
        return num_layers // (stage_layers * pp)

    def _check_sizes(self) -> None:
        for flag, size in (
            ("--tensor_model_parallel_size", self.tensor_model_parallel_size),
            ("--pipeline_model_parallel_size", self.pipeline_model_parallel_size),
            ("--num_layers_per_virtual_pipeline_stage", self.num_layers_per_virtual_pipeline_stage),
            ("--recompute_num_layers", self.recompute_num_layers),
        ):
            if size is not None and size < 1:
                raise ConfigError(f"{flag} {size} is not a positive number; use 1 or more.")

    def _derive_schedule(self) -> None:
        stage_layers = self.num_layers_per_virtual_pipeline_stage
        if self.pipeline_schedule is None:
            object.__setattr__(self, "pipeline_schedule", "1f1b" if stage_layers is None else "interleaved")
        if self.pipeline_schedule != "interleaved":
            if stage_layers is not None:
                raise ConfigError(
                    f"--pipeline_schedule {self.pipeline_schedule} has one stage per process, so "
                    f"--num_layers_per_virtual_pipeline_stage {stage_layers} has no meaning; drop one of the two."
                )
            return
        if stage_layers is None:
            raise ConfigError(
                "--pipeline_schedule interleaved needs the size of its stages; "
                "give --num_layers_per_virtual_pipeline_stage."
            )
        if self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                "--pipeline_model_parallel_size 1 has nothing to interleave; raise it, or drop "
                "--num_layers_per_virtual_pipeline_stage and --pipeline_schedule interleaved."
            )

    def _derive_zero_stage(self) -> None:
        if self.zero_stage is None:
            object.__setattr__(self, "zero_stage", 1 if self.use_distributed_optimizer else 0)
        if self.use_distributed_optimizer and self.zero_stage != 1:
            raise ConfigError(
                f"--use_distributed_optimizer means --zero_stage 1, and --zero_stage {self.zero_stage} was given; "
                "drop one of the two."
            )

    def _derive_recompute_method(self) -> None:
        if self.recompute_granularity == "full":
            if self.recompute_method is None:
                object.__setattr__(self, "recompute_method", "uniform")
            return
        for flag, value, default in (
            ("--recompute_method", self.recompute_method, None),
            ("--recompute_num_layers", self.recompute_num_layers, 1),
        ):
            if value != default:
                raise ConfigError(
                    f"{flag} {value} is for whole layers, and --recompute_granularity is "
                    f"{self.recompute_granularity or 'not given'}; drop it or use --recompute_granularity full."
                )
