"""Instruction samples: which tokens count, that every conversation comes once an epoch, alone or in packs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron.data.epoch_blend import EpochBlend
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.instruct import (
    Conversations,
    InstructionDataset,
    LossWeights,
    instruction_prefix,
    plan_packs,
)
from megatron.data.loader import Padding, batches_for_step
from megatron.data.sample import Sample
from megatron.errors import DataError

SAMPLES = Path(__file__).parent / "samples" / "instruct" / "conv_sys"
PAD = 7


def write(prefix: Path, lengths: list[int], seed: int = 0, vocab_size: int = 100) -> Path:
    """Conversations whose tokens begin with their number + 1000; turns of a random length."""
    random = np.random.default_rng(seed)
    for name in ("text", "role"):
        with IndexedDatasetWriter(f"{prefix}-{name}", "uint16", has_documents=False) as writer:
            random = np.random.default_rng(seed)
            for number, length in enumerate(lengths):
                tokens = random.integers(0, vocab_size, length)
                tokens[:1] = 1000 + number
                roles = np.sort(random.integers(0, 3, length))
                writer.add_item((tokens if name == "text" else roles).astype(np.uint16))
    return prefix


LENGTHS = [5, 1, 12, 3, 0, 30, 9, 2, 7, 17, 4, 8]


@pytest.fixture
def conversations(tmp_path: Path) -> Conversations:
    return Conversations(write(tmp_path / "chat", LENGTHS))


def test_the_originals_files_are_read_and_only_answers_count():
    dataset = InstructionDataset(Conversations(SAMPLES), range(12), 12, 400, seed=1)
    seen = set()
    for k in range(12):
        sample = dataset[k]
        number = next(i for i in range(12) if np.array_equal(dataset.conversations.text.get(i), sample.tokens))
        roles = dataset.conversations.read(number, 1000)[1]
        assert np.array_equal(sample.loss_mask, (roles[1:] == 2).astype(np.float32)) and sample.loss_mask.sum() > 0
        assert sample.position_ids is None and sample.segment_ids is None
        seen.add(number)
    assert seen == set(range(12))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (LossWeights(), [0, 0, 0, 1]),
        (LossWeights("user"), [0, 1, 1, 0]),
        (LossWeights("all", 0.5), [1, 1, 1, 1]),
        (LossWeights("assistant", 0.25), [0.25, 0.25, 0.25, 1]),
        (LossWeights("user", 0.5), [0.5, 1, 1, 0.5]),
    ],
)
def test_the_weight_of_a_label_is_that_of_its_role(weights: LossWeights, expected: list[float]):
    assert weights.of(np.array([0, 1, 1, 2], dtype=np.uint16)).tolist() == expected


def test_every_epoch_serves_every_conversation_once_in_an_order_of_its_own(conversations: Conversations):
    dataset = InstructionDataset(conversations, range(2, 12), 30, 64, seed=3)
    epochs = [[int(dataset[epoch * 10 + i].tokens[0]) for i in range(10)] for epoch in range(3)]
    # Conversations 4 and those before 2 have no first token here.
    assert all(Counter(epoch) == Counter([0, *(1000 + i for i in range(2, 12) if i != 4)]) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    again = InstructionDataset(conversations, range(2, 12), 1000, 64, seed=3)
    assert [int(again[i].tokens[0]) for i in range(30)] == [number for epoch in epochs for number in epoch]
    assert dataset.has_same_order_for(1000) and not dataset.has_same_order_for(None)
    with pytest.raises(IndexError, match="sample 30 of a dataset of 30"):
        dataset[30]


def test_a_conversation_is_cut_at_the_sequence_length_and_the_loss_is_counted(conversations: Conversations):
    dataset = InstructionDataset(conversations, range(12), 12, 8, seed=3)
    lengths = Counter(len(dataset[k].tokens) for k in range(12))
    # What has no label is one sample of two tokens that count nothing.
    assert lengths == Counter(max(2, min(length, 9)) for length in LENGTHS)
    truncation = dataset.truncation()
    assert (truncation.num_cut, truncation.num_conversations) == (3, 12)
    assert truncation.lost_tokens == (12 - 9) + (30 - 9) + (17 - 9)


def alone(conversations: Conversations, number: int, sequence_length: int, weights: LossWeights) -> Sample:
    return InstructionDataset(conversations, range(number, number + 1), 1, sequence_length, 0, weights=weights)[0]


@pytest.mark.parametrize("sequence_length", [16, 29, 64])
def test_a_pack_holds_what_its_conversations_are_alone(conversations: Conversations, sequence_length: int, tmp_path):
    weights = LossWeights("assistant", 0.5)
    packs = plan_packs(conversations, range(12), sequence_length, tmp_path)
    dataset = InstructionDataset(conversations, range(12), len(packs), sequence_length, 5, weights=weights, packs=packs)
    seen: list[int] = []
    for k in range(len(dataset)):
        sample = dataset[k]
        assert len(sample.tokens) - 1 == len(sample.loss_mask) <= sequence_length
        assert sample.segment_ids is not None and sample.position_ids is not None
        for segment in range(int(sample.segment_ids[-1]) + 1):
            inputs = np.flatnonzero(sample.segment_ids == segment)
            number = int(sample.tokens[inputs[0]]) - 1000
            if number < 0:  # of an empty conversation
                continue
            seen += [number] if LENGTHS[number] > 1 else []  # one token is an input, or behind the last
            expected = alone(conversations, number, sequence_length, weights)
            assert sample.position_ids[inputs].tolist() == list(range(len(inputs)))
            if LENGTHS[number] < 2:  # an input without a label
                assert not sample.loss_mask[inputs].any()
                continue
            num_labels = len(expected.loss_mask)
            assert np.array_equal(sample.tokens[inputs[0] : inputs[0] + num_labels + 1], expected.tokens)
            assert np.array_equal(sample.loss_mask[inputs[:num_labels]], expected.loss_mask)
            assert not sample.loss_mask[inputs[num_labels:]].any()
    assert sorted(seen) == [i for i, length in enumerate(LENGTHS) if length > 1]


def test_packs_of_a_log_normal_corpus_fill_98_percent_of_the_slots(tmp_path: Path):
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.5, 0.8, 3000), 1, 10_000).astype(int).tolist()
    conversations = Conversations(write(tmp_path / "big", lengths))
    packs = plan_packs(conversations, range(3000), 255, None)
    kept = sum(min(length, 256) for length in lengths)
    assert packs.filled == kept / (len(packs) * 256) >= 0.98
    assert len(list((tmp_path / "cache").iterdir())) >= 1
    again = plan_packs(conversations, range(3000), 255, None)
    assert np.array_equal(again.items, packs.items) and np.array_equal(again.starts, packs.starts)


def test_a_blend_serves_its_shares_at_every_prefix(tmp_path: Path):
    sources = [Conversations(write(tmp_path / name, [6] * 10, seed)) for seed, name in enumerate("ab")]
    members = [lambda count, source=source: InstructionDataset(source, range(10), count, 64, 1) for source in sources]
    blend = EpochBlend(members, 100, (0.75, 0.25), None)
    for stop in range(1, 101):
        assert abs(np.count_nonzero(blend.dataset_index[:stop] == 0) - 0.75 * stop) <= 1
    assert all(
        np.array_equal(blend[k].tokens, EpochBlend(members, 50, (0.75, 0.25), None)[k].tokens) for k in range(50)
    )
    limited = EpochBlend(members, 20, (0.9, 0.1), 1.0)
    assert np.bincount(limited.dataset_index).tolist() == [10, 10]
    with pytest.raises(DataError, match="--max_epochs_per_dataset 1 leaves 20 samples, and 21 are wanted"):
        EpochBlend(members, 21, None, 1.0)
    with pytest.raises(IndexError, match="sample 100 of a blend of 100"):
        blend[100]
    assert blend.has_same_order_for(3) and len(blend) == 100
    assert limited.has_same_order_for(20) and not limited.has_same_order_for(21)


def test_padding_goes_by_length_so_that_an_end_that_is_also_the_padding_counts():
    """The last label of an answer is eos; where padding is eos too, masking by id would forget it."""
    answer = Sample(np.array([3, 4, PAD, PAD]), np.array([0, 1, 1], np.float32))
    (padded,) = Padding(PAD, 8).apply([answer])
    assert padded.tokens.tolist() == [3, 4, PAD, PAD, PAD, PAD, PAD, PAD, PAD]
    assert padded.loss_mask.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]


def test_variable_lengths_are_those_of_the_longest_sample_rounded_up_to_what_ranks_can_cut():
    def sample(length: int) -> Sample:
        return Sample(np.arange(length + 1), np.ones(length, np.float32))

    for lengths, multiple, limit, expected in [
        ([3, 9], 16, 64, 16),
        ([17], 16, 64, 32),
        ([60, 2], 16, 62, 62),
        ([17, 1], 48, 96, 48),
    ]:
        padded = Padding(0, limit, to_limit=False, multiple=multiple).apply(list(map(sample, lengths)))
        assert {len(row.loss_mask) for row in padded} == {expected}


def test_padding_is_a_segment_of_its_own(conversations: Conversations, tmp_path: Path):
    packs = plan_packs(conversations, range(12), 40, tmp_path)
    dataset = InstructionDataset(conversations, range(12), len(packs), 40, 5, packs=packs)
    (batch,) = batches_for_step(
        dataset,
        0,
        micro_batch_size=len(packs),
        data_parallel_rank=0,
        data_parallel_size=1,
        num_microbatches=1,
        padding=Padding(PAD, 48),
    )
    assert batch.segment_ids is not None and batch.position_ids is not None and batch.segment_lengths is not None
    for row, lengths in enumerate(batch.segment_lengths):
        assert sum(lengths) == 48
        numbered = np.repeat(np.arange(len(lengths)), lengths)
        assert batch.segment_ids[row].tolist() == numbered.tolist()
        assert batch.position_ids[row].tolist() == [i for length in lengths for i in range(length)]
        assert (batch.tokens[row][-lengths[-1] + 1 :] == PAD).all() and not batch.loss_mask[row][-lengths[-1] :].any()


def test_every_name_of_the_files_is_one_of_the_dataset():
    for name in ("x/chat", "x/chat-text", "x/chat-role.idx", "x/chat-text.bin"):
        assert instruction_prefix(name) == "x/chat"


def test_files_that_do_not_belong_together_and_empty_shares_are_refused(tmp_path: Path, conversations: Conversations):
    write(tmp_path / "other", LENGTHS[::-1])
    for suffix in (".bin", ".idx"):
        (tmp_path / f"other-role{suffix}").replace(tmp_path / f"chat-role{suffix}")
    with pytest.raises(DataError, match="chat: -text and -role hold conversations of different lengths"):
        conversations.text  # noqa: B018
    with pytest.raises(DataError, match="chat: no conversations; choose other data or another --split"):
        InstructionDataset(conversations, range(3, 3), 5, 8, 1)
