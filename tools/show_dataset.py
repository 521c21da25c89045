"""Prints the samples of a run as its model sees them.

Takes the flags of finetune.py, of which those that do not concern the data may be left out; the order of the samples
depends on --train_iters and --global_batch_size as soon as data is read more than once, or blended.
What does not count in the loss is dim, or in ‹ › where there are no colours; special tokens are reversed; roles of
conversations have colours: system magenta, user cyan, assistant green. Of BERT's pairs of texts, each token to restore
is {what the model sees→what it was}.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron.checkpoint.opening import open_source
from megatron.checkpoint.tokenizer_source import check_tokenizer
from megatron.cli import ArgumentParser, run_main
from megatron.config import RunConfig, TypedFlags, checkpoint_arguments, parse_run, resolve, resolve_tokenizer
from megatron.data.blend import parse_blend, parse_named_blends
from megatron.data.epoch_blend import EpochBlend
from megatron.data.instruct import InstructionDataset
from megatron.data.pieces import Piece, TraceableSamples
from megatron.data.sample import PairSample, SampleSource, TrainingData
from megatron.data.show import SampleText
from megatron.errors import ConfigError
from megatron.tokenizer import Tokenizer, build_tokenizer, fit_to_vocabulary
from megatron.training.checkpointing import Progress
from megatron.training.datasets import TEST, RunDatasets, build_datasets

_TRAIN: Final = "train"
# All that the data depends on of these sections; the others need not be right, nor there.
_OF_THE_MODEL: Final = frozenset({"max_position_embeddings", "vocab_size"})
_OF_TRAINING: Final = frozenset(
    {
        "model_name",
        "size",
        "seed",
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "eval_interval",
        "eval_iters",
    }
)
_ANY_MODEL: Final[Mapping[str, object]] = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}


def main(argv: list[str]) -> None:
    options, flags = _parser().parse_known_args(argv)
    if options.start < 0 or options.num_samples < 1:
        raise ConfigError(
            f"--start {options.start} --num_samples {options.num_samples}: nothing to show; count samples from 0, and "
            "show 1 or more."
        )
    typed = parse_run(flags)
    run, tokenizer = _resolve(typed, options.start + options.num_samples, with_others=options.part != _TRAIN)
    dataset, names = _choose(build_datasets(run, tokenizer, Progress()), options.part, run)
    if options.start >= len(dataset):
        raise ConfigError(
            f"--start {options.start}: there are {len(dataset)} samples, counted from 0; give a lower one."
        )
    # Whole lines, however long: the terminal wraps them.
    console = Console(no_color=options.no_color, highlight=False, soft_wrap=True, emoji=False)
    text = SampleText(tokenizer, marks=options.no_color or not console.is_terminal)
    for index in range(options.start, min(options.start + options.num_samples, len(dataset))):
        headline, body = _shown(dataset, index, names, text)
        console.print(headline, style="bold", markup=False)
        console.print(body, markup=False)


def _resolve(typed: TypedFlags, num_samples: int, *, with_others: bool) -> tuple[RunConfig, Tokenizer]:
    """As finetune.py does; what is missing for a run, but does not matter here, is made up.

    `with_others`: validation and test data as well.
    """
    flags = typed.section("checkpoint")
    source = open_source(Path(str(flags["load"]))) if flags.get("use_checkpoint_args") and "load" in flags else None
    arguments = checkpoint_arguments(source) if source is not None else None
    config = resolve_tokenizer(typed, arguments)
    tokenizer = build_tokenizer(config)
    if source is not None:
        tokenizer = fit_to_vocabulary(config, source.model_config().vocab_size)
        is_named = any(typed.section("tokenizer").get(name) for name in ("tokenizer_model", "vocab_file"))
        check_tokenizer(source, tokenizer, config.path, is_named=is_named)
    model = {name: value for name, value in typed.section("model").items() if name in _OF_THE_MODEL}
    training = {name: value for name, value in typed.section("training").items() if name in _OF_TRAINING}
    if not with_others:
        training["eval_iters"] = 0
    if arguments is None and "size" not in training:
        model = {**_ANY_MODEL, **model}
    sections = {
        "training": {"micro_batch_size": 1, "train_iters": num_samples, "eval_iters": num_samples, **training},
        "model": model,
        "data": typed.section("data"),
        "tokenizer": typed.section("tokenizer"),
        "checkpoint": {name: flags[name] for name in ("load", "use_checkpoint_args") if name in flags},
        "optimizer": {"lr": 0.0},
    }
    run = resolve(TypedFlags(sections), 1, checkpoint=arguments, tokenizer_vocab_size=tokenizer.vocab_size)
    return run, tokenizer


def _choose(datasets: RunDatasets, part: str, run: RunConfig) -> tuple[TrainingData, tuple[str, ...]]:
    """The samples of one part, and the datasets they come from by number."""
    parts = {_TRAIN: datasets.train, **datasets.validation, **datasets.test}
    if part not in parts:
        raise ConfigError(f"--part {part} is not a part of this data; use {', '.join(parts)}.")
    dataset, data = parts[part], run.data
    if data.data_path:
        return dataset, parse_blend("--data_path", data.data_path).paths
    if part == _TRAIN:
        return dataset, parse_blend("--train_data_path", data.train_data_path).paths
    name, _, own = part.partition("_")
    paths = data.test_data_path if name == TEST else data.valid_data_path
    return dataset, parse_named_blends("--valid_data_path", paths, "")[own].paths


def _shown(dataset: SampleSource, index: int, names: Sequence[str], text: SampleText) -> tuple[str, Text]:
    """A headline that tells where the sample comes from, and the sample."""
    source, own, number = _source(dataset, index)
    sample = source[own]
    if isinstance(sample, PairSample):
        origin = "the second text is from elsewhere" if sample.is_random else "the second text follows the first"
        return _headline(index, names[number], origin, sample.loss_mask), text.render_pair(sample)
    assert isinstance(source, TraceableSamples)
    roles = source.roles(own) if isinstance(source, InstructionDataset) else None
    pieces = source.pieces(own)
    # The pieces of blended text tell their dataset themselves.
    name = names[number or pieces[0].dataset] if pieces else "nothing"
    return _headline(index, name, _documents(pieces), sample.loss_mask), text.render(sample, pieces, roles)


def _source(dataset: SampleSource, index: int) -> tuple[SampleSource, int, int]:
    """The dataset that serves a sample, which of its samples that is, and the number of the dataset in a blend."""
    if not isinstance(dataset, EpochBlend):
        return dataset, index, 0
    number, own = dataset.place(index)
    return dataset.datasets[number], own, number


def _documents(pieces: Sequence[Piece]) -> str:
    documents = list(dict.fromkeys(piece.document for piece in pieces))
    return f"document{'s' if len(documents) > 1 else ''} {', '.join(map(str, documents))}"


def _headline(index: int, name: str, origin: str, loss_mask: np.ndarray) -> str:
    return f"sample {index} · {name} · {origin} · {len(loss_mask)} inputs, {np.count_nonzero(loss_mask)} count"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        usage="%(prog)s [FLAGS OF finetune.py] [options]",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--start", type=int, default=0, metavar="N", help="number of the first sample (default: 0)")
    parser.add_argument("--num_samples", type=int, default=3, metavar="N", help="how many (default: 3)")
    parser.add_argument(
        "--part",
        default=_TRAIN,
        metavar="NAME",
        help="train, validation or test, or a set's name: validation_web (default: train)",
    )
    parser.add_argument("--no_color", action="store_true", help="text alone, with marks")
    return parser


if __name__ == "__main__":
    run_main(main)
