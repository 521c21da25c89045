"""Every family, loaded from a Hugging Face folder by any layout, computes what transformers does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed import run_distributed
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.manager import load
from megatron.checkpoint.source import MODEL, LocalTensor
from megatron.core.data_parallel import DataParallelConfig
from megatron.core.layout import ParallelLayout
from megatron.core.topology import Topology
from megatron.data.loader import Batch
from megatron.model.bert import BertLogits
from megatron.model.stage import StageOptions
from megatron.training.build import build_parts
from megatron.training.comparison import compare_logits, overall

NUM_TOKENS = 24
# With weights of this size attention is no choice of one position, and logits are small numbers.
STD = 0.15


def tokens_of(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(3))


def largest_errors(folders: dict[str, Path], layout: ParallelLayout) -> dict[str, float]:
    """Of the logits of each folder's model, against those that lie beside it."""
    device = torch.device("cpu")
    topology = Topology.create(layout, device) if layout.world_size > 1 else Topology.serial(device)
    errors = {}
    for name, folder in folders.items():
        source = HuggingFaceSource(folder)
        model = source.model_config()
        options = StageOptions(-(-model.vocab_size // 8) * 8)
        parts = build_parts(model, topology, options, DataParallelConfig())
        shards = parts.data_parallel.shards
        load(source, [LocalTensor(MODEL, s.regions(topology.tp), s.tensor.detach()) for s in shards], topology.world)
        parts.data_parallel.refresh()
        tokens = tokens_of(model.vocab_size)
        batch = Batch(tokens, tokens, torch.ones(tokens.shape), None, index=0)
        of_tokens, *others = torch.load(folder / "logits.pt", weights_only=True)
        expected = BertLogits(of_tokens, *others) if others else of_tokens
        comparisons = compare_logits(
            parts, topology, [batch], lambda _, e=expected: e, hidden_dtype=torch.float32, sequence_parallel=False
        )
        errors[name] = overall(comparisons).max_error
    topology.close()
    return errors


@pytest.fixture(scope="module")
def folders_with_logits(tmp_path_factory) -> dict[str, Path]:
    # Imported here: every rank imports this module, and has no use for what this imports.
    from hf_folders import FAMILIES, load_family, save_family

    root, folders = tmp_path_factory.mktemp("families"), {}
    for name in FAMILIES:
        folders[name] = save_family(root / name.replace(" ", "_"), name, std=STD)
        with torch.no_grad():
            output = load_family(name, folders[name]).eval()(tokens_of(131))
        # A BERT has two kinds of logits.
        logits = (output.prediction_logits, output.seq_relationship_logits) if name == "bert" else (output.logits,)
        assert 0.1 < logits[0].abs().max() < 10
        torch.save(logits, folders[name] / "logits.pt")
    return folders


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2, pp=2)], ids=str)
def test_logits_equal_those_of_transformers(folders_with_logits, layout):
    results: Sequence[dict[str, float]] = (
        run_distributed(largest_errors, 4, folders_with_logits, layout)
        if layout.world_size > 1
        else [largest_errors(folders_with_logits, layout)]
    )
    for errors in results:
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
