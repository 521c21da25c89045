"""Instruction data of random tokens, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.data.indexed_writer import IndexedDatasetWriter


def write_conversations(prefix: Path, lengths: Sequence[int], *, vocab_size: int, seed: int = 0) -> Path:
    """One conversation for each length: system, then user, then assistant, with cuts at random."""
    random = np.random.default_rng(seed)
    conversations = [(random.integers(0, vocab_size, n), np.sort(random.integers(0, 3, n))) for n in lengths]
    for suffix, part in (("text", 0), ("role", 1)):
        with IndexedDatasetWriter(f"{prefix}-{suffix}", "uint16", has_documents=False) as writer:
            for conversation in conversations:
                writer.add_item(conversation[part].astype(np.uint16))
    return prefix
