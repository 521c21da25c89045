"""Compare a checkpoint with `transformers`, logit by logit, on any layout of processes.

    python verify_correctness.py --load CHECKPOINT --huggingface_path MODEL
    torchrun --nproc_per_node 4 verify_correctness.py --tensor_model_parallel_size 2 \\
        --pipeline_model_parallel_size 2 --load CHECKPOINT --huggingface_path MODEL

Without --data_path the tokens are random. The exit status is 1 where a logit differs by more than --tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from megatron.checkpoint.agreement import on_every_rank
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.manager import load
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.source import MODEL, LocalTensor, Source
from megatron.cli import ArgumentParser, run_and_leave
from megatron.config import RunConfig, TypedFlags, checkpoint_arguments, parse_run, resolve
from megatron.core.topology import Topology, launch_environment
from megatron.data.loader import Batch, batches_for_step
from megatron.data.sample import SampleSource, TrainingData
from megatron.errors import CheckpointError, ConfigError
from megatron.model.bert import BertLogits
from megatron.model.presets import hub_name
from megatron.tokenizer import fit_to_vocabulary
from megatron.training.build import PipelineParts
from megatron.training.checkpointing import Progress
from megatron.training.comparison import Comparison, Reference, compare_logits, holds_logits, overall
from megatron.training.datasets import build_datasets
from megatron.training.logging import configure_logging
from megatron.training.run import build_run_parts, choose_device, choose_kernel, compute_dtype

if TYPE_CHECKING:
    from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

# Two correct programs differ by rounding: at 32 layers and logits of up to 30, by 1e-4 in fp32 and some 0.1 in bf16.
TOLERANCE_FP32: Final = 1e-3
TOLERANCE_BF16: Final = 0.5
RANDOM_TOKENS: Final = "random tokens"
_RANDOM_LENGTH: Final = 256
_HEADING: Final = "  batch   max error  mean error       loss  reference      error  same token"
_HUB_NAME: Final = r"[\w.-]+(/[\w.-]+)?"


def main(argv: list[str]) -> None:
    options, rest = _parser().parse_known_args(argv)
    typed = parse_run(rest)
    launch = launch_environment()
    configure_logging(launch)
    source = _open_load(typed)
    name = _reference_name(options, typed, source)
    run = _resolve(typed, launch.world_size, source)
    dataset = _open_data(run)
    device = choose_device(run)
    topology = Topology.create(run.layout, device, timeout=timedelta(minutes=run.training.distributed_timeout_minutes))

    reference = on_every_rank(
        topology.world, lambda: _load_reference(name, run, options, topology) if holds_logits(topology) else None
    )
    comparisons = compare_logits(
        _build_and_load(run, topology, source),
        topology,
        _random_batches(run, topology) if dataset is None else _data_batches(run, topology, dataset),
        reference,
        hidden_dtype=compute_dtype(run),
        sequence_parallel=run.parallel.sequence_parallel,
    )
    tolerance = _tolerance(run) if options.tolerance is None else options.tolerance
    is_correct, verdict = _judge(overall(comparisons), tolerance)
    if topology.world.is_first:
        print(_report(run, topology, name, comparisons))
        print(verdict, file=sys.stdout if is_correct else sys.stderr, flush=True)
    topology.close()
    if not is_correct:
        sys.exit(1)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every flag of finetune.py is taken as well (finetune.py --help). Architecture and tokenizer come from "
        "--load;\n--train_iters (here 10 by default) is the number of global batches, --seq_length is 256 by default.",
    )
    group = parser.add_argument_group("what to compare with (default: --load, where that is a Hugging Face folder)")
    group.add_argument("--huggingface_path", metavar="MODEL", help="folder, or name on the Hugging Face hub")
    group.add_argument(
        "--model_size", metavar="N", help="published size of --model_name on the hub; instead of --huggingface_path"
    )
    group.add_argument("--huggingface_cache", metavar="PATH", help="where downloads are kept")
    group.add_argument(
        "--huggingface_device", metavar="DEVICE", help="where transformers computes; default: where the last stage does"
    )
    group.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest absolute error of a logit that passes; default: "
        f"{TOLERANCE_FP32:g}, or {TOLERANCE_BF16:g} with --bf16",
    )
    return parser


def _open_load(typed: TypedFlags) -> Source:
    flags = typed.section("checkpoint")
    if flags.get("load") is None:
        raise ConfigError("--load is missing, and there is no checkpoint to verify; give its folder.")
    iteration = flags.get("load_iters")
    return open_source(Path(str(flags["load"])), iteration if isinstance(iteration, int) else None)


def _reference_name(options: argparse.Namespace, typed: TypedFlags, source: Source) -> str:
    """The folder or hub name for transformers, checked as far as that needs no network."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "transformers is not installed, and it computes what to compare with; pip install 'transformers>=5'."
        )
    name: str | None = options.huggingface_path
    if name is None and options.model_size is not None:
        return hub_name(str(typed.section("training").get("model_name", "gpt")), options.model_size)
    if name is None and isinstance(source, HuggingFaceSource):
        return str(source.path)
    if name is None:
        raise ConfigError(
            f"nothing says what to compare {source.path} with; give --huggingface_path, or --model_name and "
            "--model_size."
        )
    if not Path(name).is_dir() and not re.fullmatch(_HUB_NAME, name):
        raise CheckpointError(
            f"--huggingface_path {name} is neither a folder nor a name on the Hugging Face hub; check the spelling."
        )
    return name


def _resolve(typed: TypedFlags, world_size: int, source: Source) -> RunConfig:
    """A run that takes everything about the model from `source`, and of which only forward passes happen."""
    arguments = checkpoint_arguments(source)
    seq_length = min(_RANDOM_LENGTH, arguments.model.max_position_embeddings)
    sections: dict[str, dict[str, object]] = {
        **{name: dict(section) for name, section in typed.sections.items()},
        "training": {"micro_batch_size": 1, "train_iters": 10, **typed.section("training"), "eval_iters": 0},
        "optimizer": {"lr": 0.0},
        "data": {"seq_length": seq_length, **typed.section("data")},
        "checkpoint": {**typed.section("checkpoint"), "use_checkpoint_args": True},
    }
    if not sections["data"].keys() & {"data_path", "train_data_path"}:
        sections["data"]["data_path"] = (RANDOM_TOKENS,)
    return resolve(TypedFlags(sections), world_size, checkpoint=arguments)


def _open_data(run: RunConfig) -> TrainingData | None:
    """None for random tokens."""
    if run.data.data_path == (RANDOM_TOKENS,):
        return None
    return build_datasets(run, fit_to_vocabulary(run.tokenizer, run.model.vocab_size), Progress()).train


def _build_and_load(run: RunConfig, topology: Topology, source: Source) -> PipelineParts:
    parts = build_run_parts(run, topology, choose_kernel(run, topology.device))
    shards = parts.data_parallel.shards
    tensors = [LocalTensor(MODEL, shard.regions(topology.tp), shard.tensor.detach()) for shard in shards]
    load(source, tensors, topology.world)
    parts.data_parallel.refresh()
    return parts


def _load_reference(name: str, run: RunConfig, options: argparse.Namespace, topology: Topology) -> Reference:
    from transformers import AutoModelForCausalLM, AutoModelForPreTraining

    kind = AutoModelForPreTraining if run.model.bert_head else AutoModelForCausalLM
    try:
        model = kind.from_pretrained(name, dtype=compute_dtype(run), cache_dir=options.huggingface_cache)
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{name} cannot be opened by transformers ({cause}); check the name.") from error
    if model.config.vocab_size != run.model.vocab_size:
        raise CheckpointError(
            f"{name} has {model.config.vocab_size} tokens and the checkpoint {run.model.vocab_size}; compare it with "
            "the model that it was made from, before tokens are added."
        )
    device = torch.device(options.huggingface_device or topology.device)
    module: nn.Module = model.eval()
    module.to(device)
    if run.model.bert_head:
        return lambda tokens: _bert_logits(model(tokens.to(device)))
    return lambda tokens: model(tokens.to(device), use_cache=False).logits


def _bert_logits(output: BertForPreTrainingOutput) -> BertLogits:
    assert output.prediction_logits is not None and output.seq_relationship_logits is not None
    return BertLogits(output.prediction_logits, output.seq_relationship_logits)


def _random_batches(run: RunConfig, topology: Topology) -> list[Batch]:
    """The same on every layout: a batch depends on --seed and its number."""
    num_batches = run.training.train_iters * run.num_microbatches * topology.dp.size
    shape, batches = (run.training.micro_batch_size, run.data.seq_length + 1), []
    for index in range(topology.dp.rank, num_batches, topology.dp.size):
        generator = torch.Generator().manual_seed(run.training.seed + index)
        tokens = torch.randint(run.model.vocab_size, shape, generator=generator)
        mask = torch.ones(shape[0], shape[1] - 1)
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], mask, None, index).to(topology.device))
    return batches


def _data_batches(run: RunConfig, topology: Topology, dataset: SampleSource) -> list[Batch]:
    batches = batches_for_step(
        dataset,
        consumed_samples=0,
        micro_batch_size=run.training.micro_batch_size,
        data_parallel_rank=topology.dp.rank,
        data_parallel_size=topology.dp.size,
        num_microbatches=run.training.train_iters * run.num_microbatches,
    )
    return [batch.to(topology.device) for batch in batches]


def _tolerance(run: RunConfig) -> float:
    return TOLERANCE_BF16 if run.training.bf16 else TOLERANCE_FP32


def _report(run: RunConfig, topology: Topology, name: str, comparisons: Sequence[Comparison]) -> str:
    data = (*run.data.data_path, *run.data.train_data_path)[0]
    precision = "bf16" if run.training.bf16 else "fp32"
    return "\n".join(
        [
            f"checkpoint {run.checkpoint.load} on {run.layout}, {precision}, {topology.device.type}",
            f"reference  {name} in transformers",
            f"data       {data}: {run.training.micro_batch_size} x {run.data.seq_length} tokens a batch",
            _HEADING,
            *(_row(str(index), comparison) for index, comparison in enumerate(comparisons)),
            _row("all", overall(comparisons)),
        ]
    )


def _row(label: str, row: Comparison) -> str:
    logits = f"{label:>7}{row.max_error:12.3e}{row.mean_error:12.3e}"
    return f"{logits}{row.loss:11.6f}{row.reference_loss:11.6f}{row.loss_error:11.2e}{row.same_token:12.2%}"


def _judge(result: Comparison, tolerance: float) -> tuple[bool, str]:
    measured = f"the largest error of a logit is {result.max_error:.3e}"
    if result.max_error <= tolerance:  # a NaN is not
        return True, f"CORRECT: {measured}, within --tolerance {tolerance:g}."
    return False, f"WRONG: {measured}, beyond --tolerance {tolerance:g}; these are two models, or a weight is damaged."


if __name__ == "__main__":
    run_and_leave(main)
