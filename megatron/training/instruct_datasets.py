"""Instruction data of a run: each source alone or a blend of several, packed or not, and how its samples are padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import lcm
from pathlib import Path

from megatron.config import RunConfig
from megatron.data.blend import Blend, Member
from megatron.data.epoch_blend import EpochBlend
from megatron.data.instruct import (
    TEXT_SUFFIX,
    Conversations,
    InstructionDataset,
    LossWeights,
    Truncation,
    instruction_prefix,
    plan_packs,
)
from megatron.data.loader import Padding
from megatron.data.object_store import ObjectStore
from megatron.data.sample import TrainingData
from megatron.data.source import TEXT_SUFFIXES, check_vocabulary
from megatron.errors import DataError
from megatron.tokenizer import Tokenizer

# Lengths that the matmuls of a GPU like.
_LENGTH_MULTIPLE = 16


class InstructionSources:
    """Opens and builds instruction data; `about` says what the training data is, once it is built."""

    def __init__(self, run: RunConfig, cache_path: Path | None, store: ObjectStore):
        self.run, self.cache_path, self.store = run, cache_path, store
        self.about: tuple[str, ...] = ()
        self._open = cache(partial(Conversations, store=store))

    def member(self, path: str) -> Member:
        if Path(path).suffix in TEXT_SUFFIXES:
            raise DataError(
                f"{path}: is text, and instruction data is read from tokens; make them with "
                "tools/preprocess_instruct_data.py and give its --output_prefix."
            )
        text = f"{instruction_prefix(path)}{TEXT_SUFFIX}"
        opened = self._open(path).text
        return Member(text, lambda: opened, self.store)

    def build(
        self,
        blend: Blend,
        documents: Callable[[int], range],
        num_samples: int,
        max_epochs: float | None,
        *,
        is_training: bool,
    ) -> TrainingData:
        """`documents` gives the conversations of a source from their number."""
        members = [self._builder(path, documents) for path in blend.paths]
        if is_training:
            self.about = self._describe([member(0) for member in members])
        if len(members) == 1 and max_epochs is None:
            return members[0](num_samples)
        return EpochBlend(members, num_samples, blend.weights, max_epochs)

    def _builder(self, path: str, documents: Callable[[int], range]) -> Callable[[int], InstructionDataset]:
        data, conversations = self.run.data, self._open(path)
        check_vocabulary(conversations.text, self.run.model.vocab_size)
        chosen = documents(len(conversations.text))
        # A range without conversations gets its message from the dataset.
        packs = plan_packs(conversations, chosen, data.seq_length, self.cache_path) if data.packing and chosen else None
        weights = LossWeights(data.loss_role, data.scalar_loss_mask)

        def build(num_samples: int) -> InstructionDataset:
            return InstructionDataset(
                conversations,
                chosen,
                num_samples,
                data.seq_length,
                self.run.training.seed,
                weights=weights,
                packs=packs,
            )

        return build

    def _describe(self, datasets: Sequence[InstructionDataset]) -> tuple[str, ...]:
        cut = sum((dataset.truncation() for dataset in datasets), Truncation(0, 0, 0))
        text = f"{cut.num_conversations} conversations"
        packs = [dataset.packs for dataset in datasets if dataset.packs is not None]
        if packs:
            num_packs = sum(map(len, packs))
            filled = sum(part.filled * len(part) for part in packs) / num_packs
            text += f" in {num_packs} packs, {filled:.1%} of whose slots hold a token"
        if cut.num_cut:
            text += (
                f"; {cut.num_cut} are longer than --seq_length {self.run.data.seq_length} and are cut, which loses "
                f"{cut.lost_tokens} tokens"
            )
        return (text,)


def instruction_padding(run: RunConfig, tokenizer: Tokenizer) -> Padding:
    """To --seq_length, or with --variable_seq_lengths to what the longest sample needs and every rank can cut."""
    tokens = (tokenizer.pad, tokenizer.eos, 0)
    return Padding(
        token=next(token for token in tokens if token is not None),
        limit=run.data.seq_length,
        to_limit=not run.data.variable_seq_lengths,
        multiple=lcm(_LENGTH_MULTIPLE, run.layout.tp if run.parallel.sequence_parallel else 1),
    )
