"""Tiny Llamas as Meta's programs stored them, made from weights in this project's order by explicit formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# dim / n_heads = 6 is the size of a head; every number of shards up to 4 divides heads, key/value heads and widths.
DIM, LAYERS, HEADS, HEADS_KV, HEAD_DIM, VOCAB = 48, 2, 8, 4, 6, 140
# int(8/3 * 48) = 128, rounded up to a multiple of 12.
FFN = 132
PARAMS: dict[str, Any] = {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": HEADS_KV,
    "multiple_of": 12,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}


def random_weights(*, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Native name -> tensor, in the order of rows that this project has."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"embedding.word.weight": (VOCAB, DIM), "final_norm.weight": (DIM,)}
    for layer in (f"layers.{i}" for i in range(LAYERS)):
        shapes |= {
            f"{layer}.attention_norm.weight": (DIM,),
            f"{layer}.attention.q.weight": (HEADS * HEAD_DIM, DIM),
            f"{layer}.attention.k.weight": (HEADS_KV * HEAD_DIM, DIM),
            f"{layer}.attention.v.weight": (HEADS_KV * HEAD_DIM, DIM),
            f"{layer}.attention.output.weight": (DIM, HEADS * HEAD_DIM),
            f"{layer}.mlp_norm.weight": (DIM,),
            f"{layer}.mlp.gate.weight": (FFN, DIM),
            f"{layer}.mlp.up.weight": (FFN, DIM),
            f"{layer}.mlp.down.weight": (DIM, FFN),
        }
    if not tied:
        shapes["head.weight"] = (VOCAB, DIM)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def interleaved(weight: Tensor, head_dim: int = HEAD_DIM) -> Tensor:
    """Rows as Meta orders them: the pair that one angle turns lies side by side, not half a head apart."""
    out = torch.empty_like(weight)
    for head in range(weight.shape[0] // head_dim):
        for pair in range(head_dim // 2):
            for half in range(2):
                ours = head * head_dim + pair + half * head_dim // 2
                out[head * head_dim + 2 * pair + half] = weight[ours]
    return out


def meta_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dictionary of Meta's module, whole."""
    spelled = {"embedding.word": "tok_embeddings", "final_norm": "norm", "head": "output"}
    for i in range(LAYERS):
        ours, theirs = f"layers.{i}", f"layers.{i}"
        spelled |= {
            f"{ours}.attention_norm": f"{theirs}.attention_norm",
            f"{ours}.attention.q": f"{theirs}.attention.wq",
            f"{ours}.attention.k": f"{theirs}.attention.wk",
            f"{ours}.attention.v": f"{theirs}.attention.wv",
            f"{ours}.attention.output": f"{theirs}.attention.wo",
            f"{ours}.mlp_norm": f"{theirs}.ffn_norm",
            f"{ours}.mlp.gate": f"{theirs}.feed_forward.w1",
            f"{ours}.mlp.up": f"{theirs}.feed_forward.w3",
            f"{ours}.mlp.down": f"{theirs}.feed_forward.w2",
        }
    state = {}
    for name, tensor in weights.items():
        is_rotated = name.endswith((".q.weight", ".k.weight"))
        state[f"{spelled[name.removesuffix('.weight')]}.weight"] = interleaved(tensor) if is_rotated else tensor
    return state


def meta_shards(weights: dict[str, Tensor], num_shards: int, *, embedding_dim: int = 1) -> list[dict[str, Tensor]]:
    """What each rank of a tensor-parallel run saved. `embedding_dim` is 1 up to Llama 2, and 0 since."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
    for name, tensor in meta_state(weights).items():
        if name == "tok_embeddings.weight":
            parts = tensor.chunk(num_shards, embedding_dim)
        elif name.endswith(("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")):
            parts = tensor.chunk(num_shards, 0)
        elif name.endswith(("wo.weight", "w2.weight")):
            parts = tensor.chunk(num_shards, 1)
        else:
            parts = (tensor,) * num_shards
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    for shard in shards:
        shard["rope.freqs"] = torch.ones(HEAD_DIM // 2)
    return shards


def save_meta(
    folder: Path, weights: dict[str, Tensor], num_shards: int = 1, *, embedding_dim: int = 1, **params: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(meta_shards(weights, num_shards, embedding_dim=embedding_dim)):
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    return folder
