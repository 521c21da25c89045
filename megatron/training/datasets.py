"""The datasets of a run, open and checked before any process group exists."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron.checkpoint.source import JSON
from megatron.config import RunConfig
from megatron.data.blend import (
    Blend,
    BlendedDataset,
    Member,
    Request,
    parse_blend,
    parse_named_blends,
)
from megatron.data.fim import FillInMiddle, find_fim_tokens
from megatron.data.gpt import DocumentBounds, GPTDataset
from megatron.data.indexed import IndexedDataset, default_cache_path
from megatron.data.loader import Padding
from megatron.data.object_store import ObjectStore
from megatron.data.preprocess import tokenize_file
from megatron.data.sample import TrainingData
from megatron.data.source import TEXT_SUFFIXES, check_vocabulary, open_data
from megatron.data.splits import SPLIT_NAMES, parse_split, split_documents
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer
from megatron.training.checkpointing import Progress
from megatron.training.instruct_datasets import InstructionSources, instruction_padding
from megatron.training.pair_datasets import PairSources

VALIDATION, TEST = "validation", "test"

NamedData = Mapping[str, TrainingData]


@dataclass(frozen=True)
class RunDatasets:
    """`validation` and `test` by the name they are logged under; empty where the run has none.

    `num_samples` is how many of each were asked for; the datasets may have more, up to a whole epoch. `padding` is for
    samples that differ in length. `about` tells more of the training data, `fingerprint` which it is.
    """

    train: TrainingData
    validation: NamedData = field(default_factory=dict)
    test: NamedData = field(default_factory=dict)
    num_samples: Mapping[str, int] = field(default_factory=dict)
    padding: Padding | None = None
    about: tuple[str, ...] = ()
    fingerprint: int | None = None

    @property
    def record(self) -> Mapping[str, JSON]:
        """What a checkpoint keeps, because the order of training samples depends on it."""
        return {"num_samples": dict(self.num_samples), "fingerprint": self.fingerprint}


def build_datasets(run: RunConfig, tokenizer: Tokenizer, start: Progress) -> RunDatasets:
    """Opens the data, checks its ids against the vocabulary, and builds or finds the sample indices.

    The global batch size may have changed at `start`, so the samples are those consumed and those to come. Raises
    DataError or ConfigError, alike on all ranks. Validation always reads the same samples, so that its losses can
    be compared.
    """
    data, training = run.data, run.training
    num_to_come = max(0, training.train_iters - start.iteration) * training.global_batch_size
    num_train = start.consumed_samples + num_to_come
    num_eval = training.eval_iters * training.global_batch_size
    wanted = (num_train, num_eval, num_eval)
    builder = _Builder(run, tokenizer)
    if data.data_path:
        blend, share = parse_blend("--data_path", data.data_path), parse_split(data.split)[0]
        train, *evaluated = builder.cut(blend, wanted)
        assert train is not None
        validation, test = (_named(name, part) for name, part in zip((VALIDATION, TEST), evaluated, strict=True))
    else:
        blend, share = parse_blend("--train_data_path", data.train_data_path), 1.0
        train = builder.build(blend, num_train, is_training=True)
        validation = builder.named("--valid_data_path", data.valid_data_path, VALIDATION, num_eval)
        test = builder.named("--test_data_path", data.test_data_path, TEST, num_eval)
    padding = instruction_padding(run, tokenizer) if data.data_type == "instruction" else None
    num_samples = dict(zip(SPLIT_NAMES, wanted, strict=True))
    fingerprint = _fingerprint(run, builder.contents(blend, train), blend.weights, share)
    return RunDatasets(train, validation, test, num_samples, padding, builder.instructions.about, fingerprint)


def _fingerprint(run: RunConfig, contents: Sequence[str], weights: Sequence[float] | None, share: float) -> int:
    """Of the training data: what is in it, not where it lies; 63 bits, which every reader of JSON integers can hold.

    Neither the seed nor the length of the run, which a checkpoint records by themselves. Checkpoints hold it: another
    way to compute it would make every run that is resumed look like one on other data.
    """
    data, is_blend = run.data, len(contents) > 1
    facts = {
        "kind": "bert" if run.model.bert_head else data.data_type,
        "packing": data.packing,
        "seq_length": data.seq_length,
        "share": f"{share:.12g}",
        "weights": [f"{weight / sum(weights):.12g}" for weight in weights] if weights and is_blend else None,
        "contents": list(contents),
    }
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big") >> 1


def describe_continuation(datasets: RunDatasets, recorded: Mapping[str, JSON]) -> str | None:
    """What to tell a user whose run has other data or another length than the one it continues; None if it has not.

    `recorded` is the `record` of the run that is continued. Older runs have none of the data.
    """
    if recorded.get("fingerprint", datasets.fingerprint) != datasets.fingerprint:
        return (
            "the training data is not that of the checkpoint: its files, their weights, --split or --seq_length are "
            "others; the order of the samples changes, so some of this epoch's may come twice and some not at all"
        )
    num_samples, now = recorded.get("num_samples"), datasets.num_samples[SPLIT_NAMES[0]]
    before = num_samples.get(SPLIT_NAMES[0]) if isinstance(num_samples, Mapping) else None
    if not isinstance(before, int) or datasets.train.has_same_order_for(before):
        return None
    return (
        f"the checkpoint's run was laid out for {before} samples and this one for {now}: "
        "the order of the samples changes, so some of this epoch's may come twice and some not at all"
    )


def _named(name: str, part: TrainingData | None) -> NamedData:
    return {} if part is None else {name: part}


def _fill_in_middle(run: RunConfig, tokenizer: Tokenizer) -> FillInMiddle | None:
    data = run.data
    if not data.fim_rate:
        return None
    tokens = find_fim_tokens(tokenizer, data.fim_tokens)
    return FillInMiddle(tokenizer, tokens, data.fim_rate, data.fim_spm_rate, run.training.seed)


class _Builder:
    """Builds datasets of one run, each of one source alone or a blend of several."""

    def __init__(self, run: RunConfig, tokenizer: Tokenizer):
        self.run, self.tokenizer = run, tokenizer
        self.cache_path = None if run.data.data_cache_path is None else Path(run.data.data_cache_path)
        self.store = ObjectStore(self.cache_path)
        self.instructions = InstructionSources(run, self.cache_path, self.store)
        self.pairs = PairSources(run, tokenizer, self.cache_path, self.store) if run.model.bert_head else None
        self.bounds = DocumentBounds(
            reset_positions=run.data.reset_position_ids,
            reset_attention=run.data.reset_attention_mask,
            eod=tokenizer.eod if run.data.eod_mask_loss else None,
        )
        self.fim = _fill_in_middle(run, tokenizer)
        if run.data.eod_mask_loss and tokenizer.eod is None:
            raise ConfigError(
                f"--eod_mask_loss: the {tokenizer.identity.type} has no end-of-document token; drop the flag."
            )

    def cut(self, blend: Blend, wanted: tuple[int, int, int]) -> list[TrainingData | None]:
        """Training, validation and test from the shares of each source's documents.

        The default split leaves small corpora without test documents; then there is no test, and that is no error.
        """
        split, sizes = self.run.data.split, [self._count(path) for path in blend.paths]
        parts = [split_documents(parse_split(split), size) for size in sizes]
        # A pair's second text may come from another document.
        needed, left = (1, "none") if self.pairs is None else (2, "fewer than two")
        is_empty = [sum(len(part[i]) for part in parts) < needed for i in range(len(SPLIT_NAMES))]
        for name, count, empty in zip(SPLIT_NAMES[:-1], wanted, is_empty, strict=False):
            if count and empty:
                raise DataError(
                    f"{', '.join(blend.paths)}: --split {split!r} of {sum(sizes)} documents leaves {left} for {name} "
                    f"(wanted: {count} samples); give {name} a larger share, use more documents, or ask for no {name} "
                    "samples (--eval_iters 0 for valid and test)."
                )
        return [
            self.build(blend, count, is_training=i == 0, split=i) if count and not is_empty[i] else None
            for i, count in enumerate(wanted)
        ]

    def named(self, flag: str, values: tuple[str, ...], name: str, num_samples: int) -> NamedData:
        if num_samples == 0:
            return {}
        blends = parse_named_blends(flag, values, "")
        return {f"{name}_{own}" if own else name: self.build(blend, num_samples) for own, blend in blends.items()}

    def build(
        self, blend: Blend, num_samples: int, *, is_training: bool = False, split: int | None = None
    ) -> TrainingData:
        """`split` chooses one part of the documents that --split cuts; None takes all of them."""
        data, seed = self.run.data, self.run.training.seed
        max_epochs = data.max_epochs_per_dataset if is_training else None

        def documents(num_documents: int) -> range:
            if split is None:
                return range(num_documents)
            return split_documents(parse_split(data.split), num_documents)[split]

        if data.data_type == "instruction":
            return self.instructions.build(blend, documents, num_samples, max_epochs, is_training=is_training)
        if self.pairs is not None:
            return self.pairs.build(blend, documents, num_samples, max_epochs)
        members = [self._member(path) for path in blend.paths]
        # Of what the user gave: text is itself tokenized into the cache.
        cache_path = self.cache_path or default_cache_path(blend.paths[0])
        if len(members) == 1 and max_epochs is None:
            indexed = members[0].open()
            check_vocabulary(indexed, self.run.model.vocab_size)
            return GPTDataset(
                indexed,
                documents(len(indexed)),
                num_samples,
                data.seq_length,
                seed,
                bounds=self.bounds,
                fim=self.fim,
                cache_path=cache_path,
            )
        request = Request(
            num_samples=num_samples,
            sequence_length=data.seq_length,
            seed=seed,
            documents=documents,
            documents_key="all" if split is None else f"{data.split} [{split}]",
            vocab_size=self.run.model.vocab_size,
            weights=blend.weights,
            max_epochs=max_epochs,
        )
        return BlendedDataset(members, request, self.bounds, cache_path, self.fim)

    def contents(self, blend: Blend, train: TrainingData) -> tuple[str, ...]:
        """The fingerprint of every source, computed already, or known to the cache."""
        if isinstance(train, (GPTDataset, BlendedDataset)):
            return train.contents
        return tuple(self._member(path).open().fingerprint for path in blend.paths)

    def _count(self, path: str) -> int:
        """What --split cuts: documents, which are one sequence each but where sentences are."""
        member = self._member(path)
        return member.count_sequences() if self.pairs is None else member.open().num_documents

    def _member(self, path: str) -> Member:
        if self.pairs is not None:
            return self.pairs.member(path)
        if self.run.data.data_type == "instruction":
            return self.instructions.member(path)
        if Path(path).suffix not in TEXT_SUFFIXES:
            return Member(path, partial(IndexedDataset, path, self.store), self.store)
        indexed = open_data(
            path,
            tokenize_file=partial(tokenize_file, tokenizer=self.tokenizer),
            tokenizer_fingerprint=self.tokenizer.identity.fingerprint,
            cache_path=self.cache_path,
        )
        return Member(indexed.prefix, lambda: indexed)
