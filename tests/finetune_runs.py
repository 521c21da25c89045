"""finetune.py as a user types it, on ranks that are warm already, and what it leaves behind."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import finetune
from distributed import run_distributed
from megatron.checkpoint.opening import open_source
from megatron.cli import entry
from megatron.data.indexed_writer import IndexedDatasetWriter
from rank_process import REPOSITORY

VOCAB_SIZE = 61
SEQ_LENGTH = 16
GLOBAL_BATCH_SIZE = 4

# A Llama in small. 60 documents of 20 tokens, of which 48 train, are 59 samples: 20 steps take more than one epoch.
NUM_DOCUMENTS, DOCUMENT_LENGTH = 60, 20
FLAGS: Mapping[str, object] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_attention_heads_kv": 2,
    "ffn_hidden_size": 48,
    "use_rms_norm": None,
    "glu_activation": "swiglu",
    "position_embedding_type": "rotary",
    "no_tie_embed_logits": None,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": VOCAB_SIZE,
    "make_vocab_size_divisible_by": 8,
    "seq_length": SEQ_LENGTH,
    "split": "8,2",
    "micro_batch_size": 1,
    "global_batch_size": GLOBAL_BATCH_SIZE,
    "train_iters": 20,
    "eval_interval": 5,
    "eval_iters": 1,
    "lr": 0.01,
    "lr_warmup_fraction": 0.15,
    "device": "cpu",
}


def command(data: Path, **flags: object) -> list[str]:
    """The flags of a small run on `data` with `flags` on top; None is a flag without a value, False leaves one out."""
    merged = {**FLAGS, "data_path": data, **flags}
    return [
        token
        for name, value in merged.items()
        if value is not False
        for token in ([f"--{name}"] if value is None else [f"--{name}", str(value)])
    ]


def write_tokens(prefix: Path, *, vocab_size: int = VOCAB_SIZE, num_documents: int = NUM_DOCUMENTS) -> Path:
    """Documents that a model can learn: each counts up from a random token."""
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for start in generator.integers(vocab_size, size=num_documents):
            writer.add_document((start + np.arange(DOCUMENT_LENGTH)) % vocab_size)
    return prefix


@dataclass(frozen=True)
class Ending:
    """How one command ended on one rank."""

    status: int
    out: str
    err: str


def finetune_runs(world_size: int, *commands: Sequence[str]) -> list[list[Ending]]:
    """Runs finetune.py with each command in turn on `world_size` ranks; ``[command][rank]`` says how it ended."""
    endings = run_distributed(run_in_turn, world_size, commands, timeout_s=120)
    return [list(of_command) for of_command in zip(*endings, strict=True)]


def finetune_succeeds(world_size: int, *commands: Sequence[str]) -> list[str]:
    """As `finetune_runs`; returns what rank 0 printed, both streams, and fails unless every command succeeds."""
    runs = finetune_runs(world_size, *commands)
    for ending in (ending for run in runs for ending in run):
        assert ending.status == 0, ending.err
    return [run[0].out + run[0].err for run in runs]


def run_in_turn(commands: Sequence[Sequence[str]]) -> list[Ending]:
    """On a rank: every command with a process group of its own, which finetune.py takes over and ends."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folder: list[str | None] = [tempfile.mkdtemp(prefix="stores-") if rank == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    dist.barrier()
    dist.destroy_process_group()
    endings = []
    for number, argv in enumerate(commands):
        store = dist.FileStore(f"{folder[0]}/{number}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        endings.append(run_command(argv))
        if dist.is_initialized():  # after an error
            dist.barrier()
            dist.destroy_process_group()
    return endings


def run_command(argv: Sequence[str]) -> Ending:
    """finetune.py in this process, up to where the process would end."""
    entry.time = SimpleNamespace(sleep=end_of_the_launcher)  # type: ignore[attr-defined]
    out, err = io.StringIO(), io.StringIO()
    status: int | str | None = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            entry.run_main(finetune.main, argv)
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    return Ending(status, out.getvalue(), err.getvalue())


def end_of_the_launcher(seconds: float) -> None:
    """While a failed rank waits for local rank 0 to say why, torchrun ends it."""
    raise SystemExit(2)


def stored_entries(folder: Path, iteration: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole: weights and optimizer state."""
    source = open_source(folder, iteration)
    return {name: source.read(name, (0,) * len(source.shape(name)), source.shape(name)) for name in source.names()}


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].dtype != other[name].dtype] == []
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def script_main(path: str) -> Callable[[list[str]], None]:
    """The main function of a script of this repository: a process of its own would be all imports."""
    file = REPOSITORY / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
