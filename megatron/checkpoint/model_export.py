"""A checkpoint as a whole Hugging Face model: what its weights' export, its tokenizer and its configuration consist of.

They go together: config.json states ids of the tokenizer, and the tokenizer's ids must have rows in the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron.checkpoint.hf import CONFIG_FILE, GENERATION_FILE, carried_files
from megatron.checkpoint.hf_export import Export, plan_export
from megatron.checkpoint.source import Source
from megatron.checkpoint.tokenizer_export import ExportedTokenizer, export_tokenizer
from megatron.tokenizer.config import TokenizerConfig
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer


@dataclass(frozen=True)
class ModelExport:
    weights: Export
    tokenizer: ExportedTokenizer

    def warnings(self) -> list[str]:
        """What transformers will do otherwise than training did."""
        found = []
        if self.tokenizer.differing_text is not None:
            found.append(
                f"transformers cuts some texts otherwise than SentencePiece, {self.tokenizer.differing_text!r} for "
                "example; added tokens have their ids. Use tokenizer.model where every id has to agree."
            )
        is_sentencepiece = isinstance(self.tokenizer.tokenizer, SentencePieceTokenizer)
        if is_sentencepiece and self.weights.json_files[CONFIG_FILE]["model_type"] == "qwen2":
            found.append(
                "AutoTokenizer takes every tokenizer of a qwen2 model for Qwen's own, and this is SentencePiece; load "
                "it with PreTrainedTokenizerFast.from_pretrained."
            )
        return found


def plan_model_export(
    source: Source,
    tokenizer: TokenizerConfig | None,
    scratch: Path,
    *,
    dtype: torch.dtype | None = None,
    overrides: Mapping[str, str] | None = None,
) -> ModelExport:
    """Reads names and shapes of `source`, and writes the tokenizer's new files to `scratch`, to be copied from there.

    A model that was born here gets all ids of its special tokens in config.json, another one those of `overrides`.
    Raises what `plan_export` and `export_tokenizer` raise.
    """
    carried = carried_files(source)
    exported = ExportedTokenizer({})
    if tokenizer is not None:
        exported = export_tokenizer(tokenizer, source.model_config().vocab_size, scratch, overrides)
    is_new = "hf_config" not in carried
    export = plan_export(source, dtype=dtype, special_tokens=exported.ids() if is_new else None)
    files = {name: dict(content) for name, content in export.json_files.items()}
    if is_new and len(stop_ids := exported.stop_ids()) > 1:
        # Documents ended with <EOD>, answers end with eos.
        files[GENERATION_FILE] = {**exported.ids(), "eos_token_id": stop_ids}
    for name in files.keys() & {CONFIG_FILE, GENERATION_FILE}:
        files[name] |= exported.overridden
    return ModelExport(replace(export, json_files=files), exported)
