"""Which data a run reads, and in pieces of which length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron.data.blend import parse_blend, parse_named_blends
from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data cut by `split`, or data of its own each for training, validation and test.

    Data is the prefix of a .bin/.idx pair, or a .jsonl or .txt file that is tokenized once into a cache; or several of
    them, served by their sizes or by the weights before them.
    """

    data_path: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "[WEIGHT] PATH",
            "help": "prefix of a .bin/.idx pair, or a .jsonl or .txt file, cut by --split; several are blended",
        },
    )
    train_data_path: tuple[str, ...] = field(
        default=(), metadata={"metavar": "[WEIGHT] PATH", "help": "training data of its own; not with data_path"}
    )
    valid_data_path: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "[WEIGHT] PATH",
            "help": "validation data of its own; NAME=PATH ... for several sets, each evaluated under its name",
        },
    )
    test_data_path: tuple[str, ...] = field(
        default=(), metadata={"metavar": "[WEIGHT] PATH", "help": "test data of its own"}
    )
    max_epochs_per_dataset: float | None = field(
        default=None,
        metadata={"help": "how often training may read each dataset; the others of a blend then take its share"},
    )
    split: str = field(
        default="969,30,1", metadata={"help": "shares of --data_path's documents for training, validation and test"}
    )
    seq_length: int = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "tokens of one sample; default: the checkpoint's with --use_checkpoint_args, else "
            "max_position_embeddings"
        },
    )
    data_cache_path: str | None = field(
        default=None,
        metadata={"metavar": "PATH", "help": "folder for tokenized files and sample indices; default: beside the data"},
    )
    data_type: Literal["gpt", "instruction"] = field(
        default="gpt",
        metadata={"help": "gpt: documents end to end; instruction: conversations of tools/preprocess_instruct_data.py"},
    )
    loss_role: Literal["assistant", "user", "all"] = field(
        default="assistant", metadata={"help": "instruction data: whose tokens are learnt"}
    )
    scalar_loss_mask: float = field(
        default=0.0, metadata={"help": "instruction data: the weight of the other tokens' loss"}
    )
    variable_seq_lengths: bool = field(
        default=False,
        metadata={"help": "instruction data: a micro-batch is as long as its longest sample, not --seq_length"},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "instruction data: several conversations share a sample, and none sees another"},
    )
    mask_prob: float = field(default=0.15, metadata={"help": "BERT: share of the tokens that are to be restored"})
    short_seq_prob: float = field(
        default=0.1, metadata={"help": "BERT: share of the samples that are made shorter than seq_length"}
    )
    reset_position_ids: bool = field(default=False, metadata={"help": "count positions anew in each document"})
    reset_attention_mask: bool = field(default=False, metadata={"help": "attention stays inside each document"})
    eod_mask_loss: bool = field(default=False, metadata={"help": "what follows the end of a document is no target"})
    fim_rate: float = field(
        default=0.0,
        metadata={"help": "share of the documents in which the middle is moved to the end, to be filled in"},
    )
    fim_spm_rate: float = field(
        default=0.5,
        metadata={"help": "share of those that show the suffix first (SPM); the others: prefix first (PSM)"},
    )
    fim_tokens: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "TOKEN",
            "help": "the tokens before prefix, middle and suffix; default: <fim_prefix> <fim_middle> <fim_suffix>, or "
            "Qwen's or Code Llama's",
        },
    )
    num_workers: int = field(default=2, metadata={"help": "threads that read ahead; 0: read when needed"})

    def __post_init__(self) -> None:
        """Raises ConfigError for sources that contradict each other and for values that no run can use."""
        self._check_sources()
        self._check_type()
        if self.seq_length is not None and self.seq_length < 1:
            raise ConfigError(f"--seq_length {self.seq_length} holds no token; use 1 or more.")
        self._check_fim()
        if self.num_workers < 0:
            raise ConfigError(f"--num_workers {self.num_workers} is negative; use 0 to read when needed.")
        if not 0 < self.mask_prob < 1:
            raise ConfigError(f"--mask_prob {self.mask_prob:g} is no share of a text; use 0.15, say, or leave it out.")
        if not 0 <= self.short_seq_prob <= 1:
            raise ConfigError(f"--short_seq_prob {self.short_seq_prob:g} is no probability; use 0 to 1.")

    def _check_fim(self) -> None:
        for flag, rate in (("--fim_rate", self.fim_rate), ("--fim_spm_rate", self.fim_spm_rate)):
            if not 0 <= rate <= 1:
                raise ConfigError(f"{flag} {rate:g} is no share; use 0 to 1.")
        if len(self.fim_tokens) not in (0, 3):
            raise ConfigError(
                f"--fim_tokens {' '.join(self.fim_tokens)}: {len(self.fim_tokens)} tokens; give three, those before "
                "prefix, middle and suffix."
            )
        if self.fim_rate and self.data_type != "gpt":
            raise ConfigError(
                f"--fim_rate {self.fim_rate:g} is about documents end to end; drop it, or --data_type {self.data_type}."
            )

    @property
    def has_own_sources(self) -> bool:
        """Whether training, validation and test each have a source, instead of shares of one."""
        return bool(self.train_data_path or self.valid_data_path or self.test_data_path)

    @property
    def _evaluated(self) -> dict[str, tuple[str, ...]]:
        return {"--valid_data_path": self.valid_data_path, "--test_data_path": self.test_data_path}

    def _check_type(self) -> None:
        given = {
            "gpt": {
                f"--loss_role {self.loss_role}": self.loss_role != "assistant",
                f"--scalar_loss_mask {self.scalar_loss_mask:g}": self.scalar_loss_mask != 0.0,
                "--variable_seq_lengths": self.variable_seq_lengths,
                "--packing": self.packing,
            },
            "instruction": {
                "--reset_position_ids": self.reset_position_ids,
                "--reset_attention_mask": self.reset_attention_mask,
                "--eod_mask_loss": self.eod_mask_loss,
            },
        }
        wrong = [flag for flag, is_given in given[self.data_type].items() if is_given]
        if wrong and self.data_type == "gpt":
            raise ConfigError(f"{wrong[0]} is about conversations; give --data_type instruction too, or drop it.")
        if wrong:
            raise ConfigError(
                f"{wrong[0]} is about documents end to end, and conversations never see each other; drop it, or "
                "--data_type instruction."
            )
        if not 0.0 <= self.scalar_loss_mask < float("inf"):
            raise ConfigError(
                f"--scalar_loss_mask {self.scalar_loss_mask:g} is no weight; give 0 or more, usually less than 1."
            )

    def _check_sources(self) -> None:
        for flag, paths in (("--data_path", self.data_path), ("--train_data_path", self.train_data_path)):
            parse_blend(flag, paths)
        own = {"--train_data_path": self.train_data_path, **self._evaluated}
        for flag, paths in self._evaluated.items():
            parse_named_blends(flag, paths, "")
        if self.max_epochs_per_dataset is not None and not self.max_epochs_per_dataset > 0:
            raise ConfigError(
                f"--max_epochs_per_dataset {self.max_epochs_per_dataset:g} reads nothing; use 1, say, or leave it out."
            )
        if not self.has_own_sources:
            return
        if self.data_path:
            given = next(flag for flag, paths in own.items() if paths)
            raise ConfigError(
                f"--data_path {self.data_path[0]} is cut into training, validation and test by --split, so {given} "
                "cannot be given with it; use --data_path alone, or --train_data_path, --valid_data_path and "
                "--test_data_path."
            )
        if not self.train_data_path:
            raise ConfigError(
                "--train_data_path is missing, and validation and test data have been given their own paths; add it."
            )
