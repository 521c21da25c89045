"""Tokenized sentences that show where they are from, and the special tokens for samples of them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from megatron.data.bert import BertDataset, PairRequest
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.masking import MaskedTokens

SENTENCE_VOCAB_SIZE = 1031
_SPECIAL = MaskedTokens(cls=1027, sep=1028, mask=1029, pad=1030, vocab_size=SENTENCE_VOCAB_SIZE)


def write_sentences(prefix: Path, *, num_documents: int = 30, vocab_size: int = 1027) -> Path:
    """Documents of 1 to 12 sentences of 1 to 9 tokens, each of which counts up from a random one."""
    draw = random.Random(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(num_documents):
            for _ in range(draw.randint(1, 12)):
                writer.add_item((draw.randrange(vocab_size) + np.arange(draw.randint(1, 9))) % vocab_size)
            writer.end_document()
    return prefix


def open_pairs(prefix: Path, num_samples: int, sequence_length: int, num_documents: int = 30) -> BertDataset:
    """Half of the samples are short, so that micro-batches differ in what they count."""
    request = PairRequest(range(num_documents), num_samples, sequence_length, seed=7, short_seq_prob=0.5)
    return BertDataset(IndexedDataset(prefix), request, _SPECIAL)
