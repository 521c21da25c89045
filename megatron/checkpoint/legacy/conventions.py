"""In which order the rows of fused tensors lie. It differs between programs and their versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron.checkpoint.fused_qkv import grouped_qkv
from megatron.model.config import ModelConfig

QkvOrder = Literal["grouped", "stacked", "striped"]


@dataclass(frozen=True)
class Conventions:
    """`rotary_pairs`: neighbouring dimensions of a head rotate together (Meta's order), not those half a head apart.

    `gate_first` is of gated MLPs: Megatron-LM stores the gate before the up-projection, Megatron-LLM after it.
    `qkv`, where every query head has its own key head, on each tensor rank: head by head (version 2 on), all q before
    all k and v (version 0), or dimension by dimension (version 1).
    """

    rotary_pairs: bool
    gate_first: bool
    qkv: QkvOrder = "grouped"


def qkv_rows(model: ModelConfig, part: Literal["q", "k", "v"], conventions: Conventions, tp: int) -> Tensor:
    """[rows of `part`] -> where each lies in the fused tensors of all tensor ranks, one after the other."""
    head_dim = model.kv_channels
    if conventions.qkv == "grouped":
        runs = grouped_qkv(model.num_attention_heads, model.num_attention_heads_kv, head_dim)
        ordered = sorted((run for run in runs if run.part == part), key=lambda run: run.part_row)
        rows = torch.cat([torch.arange(run.fused_row, run.fused_row + run.num_rows) for run in ordered])
    else:
        rows = _old_rows(model.num_attention_heads, head_dim, "qkv".index(part), conventions.qkv, tp)
    return rows if part == "v" else rows.unflatten(0, (-1, head_dim))[:, head_rows(model, conventions)].flatten()


def head_rows(model: ModelConfig, conventions: Conventions) -> Tensor:
    """[dimensions of a query's or key's head] -> where each lies among those of the stored head."""
    rows = torch.arange(model.kv_channels)
    if not conventions.rotary_pairs or model.position_embedding_type != "rotary":
        return rows
    return rows.unflatten(0, (-1, 2)).t().flatten()


def gated_rows(model: ModelConfig, part: Literal["gate", "up"], conventions: Conventions, tp: int) -> Tensor:
    """The same for the two parts of a gated MLP: each tensor rank has its share of one, then of the other."""
    share = model.ffn_hidden_size // tp
    second = (part == "up") == conventions.gate_first
    row = torch.arange(model.ffn_hidden_size)
    return row // share * 2 * share + row % share + second * share


def _old_rows(num_heads: int, head_dim: int, part: int, order: QkvOrder, tp: int) -> Tensor:
    heads = num_heads // tp
    rank, head, dim = (
        torch.arange(size).reshape(shape)
        for size, shape in ((tp, (-1, 1, 1)), (heads, (1, -1, 1)), (head_dim, (1, 1, -1)))
    )
    if order == "stacked":
        return (((rank * 3 + part) * heads + head) * head_dim + dim).flatten()
    return (((rank * heads + head) * head_dim + dim) * 3 + part).flatten()
