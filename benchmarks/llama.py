"""A Llama as one writes it by hand in plain PyTorch, batch first: what a framework's overhead is measured against.

Legend: b micro-batch, s sequence, h hidden, d head dimension, v vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workload import Size, whole_weight
from megatron.model.config import ModelConfig


class Llama(nn.Module):
    """tokens: [b, s] -> logits [b, s, v]. `fused` joins q|k|v and gate|up; DTensor needs them apart."""

    def __init__(self, size: Size, *, fused: bool):
        super().__init__()
        config = size.model
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, fused=fused) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        angles = torch.outer(torch.arange(size.seq_length), _frequencies(config))
        self.cos, self.sin = (f(angles).view(1, size.seq_length, 1, -1) for f in (torch.cos, torch.sin))
        self._fill(size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))

    @torch.no_grad()
    def _fill(self, size: Size) -> None:
        """Takes the framework's initial weights; a fused weight is its parts one below the other."""
        for name, parameter in self.named_parameters():
            parts = [(_logical_name(part), rows) for part, rows in _parts(name, size.model, parameter.shape[0])]
            values = [whole_weight(size, part, (rows, *parameter.shape[1:])) for part, rows in parts]
            parameter.copy_(torch.cat(values))


class Layer(nn.Module):
    """[b, s, h] -> [b, s, h]."""

    def __init__(self, config: ModelConfig, *, fused: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config, fused=fused)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config, fused=fused)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Counts heads by what its projections return, which is this rank's part under tensor parallelism."""

    def __init__(self, config: ModelConfig, *, fused: bool):
        super().__init__()
        h, self.head_dim = config.hidden_size, config.kv_channels
        heads, kv_heads = config.num_attention_heads, config.num_attention_heads_kv
        self.heads = (heads, kv_heads, kv_heads)
        names = ("qkv",) if fused else ("q", "k", "v")
        widths = (sum(self.heads),) if fused else self.heads
        self.project = nn.ModuleDict(
            {name: nn.Linear(h, n * self.head_dim, bias=False) for name, n in zip(names, widths, strict=True)}
        )
        self.output = nn.Linear(heads * self.head_dim, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projected = [linear(x).unflatten(-1, (-1, self.head_dim)) for linear in self.project.values()]
        q, k, v = projected if len(projected) == 3 else projected[0].split(self.heads, dim=2)
        q, k, v = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.output(context.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """[b, s, h] -> [b, s, h]."""

    def __init__(self, config: ModelConfig, *, fused: bool):
        super().__init__()
        names = ("gate_up",) if fused else ("gate", "up")
        width = config.ffn_hidden_size * 2 // len(names)
        self.project = nn.ModuleDict({name: nn.Linear(config.hidden_size, width, bias=False) for name in names})
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected = [linear(x) for linear in self.project.values()]
        gate, up = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [b, s, n, d], cos and sin: [1, s, 1, d/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _frequencies(config: ModelConfig) -> Tensor:
    return config.rope_theta ** (-torch.arange(0, config.kv_channels, 2) / config.kv_channels)


def _parts(name: str, config: ModelConfig, rows: int) -> list[tuple[str, int]]:
    """The unfused names behind a parameter, and how many of its rows each has."""
    if ".project.qkv." in name:
        heads = (config.num_attention_heads, config.num_attention_heads_kv, config.num_attention_heads_kv)
        return [(name.replace("qkv", part), n * config.kv_channels) for part, n in zip("qkv", heads, strict=True)]
    if ".project.gate_up." in name:
        return [(name.replace("gate_up", part), rows // 2) for part in ("gate", "up")]
    return [(name, rows)]


def _logical_name(name: str) -> str:
    special = {"embedding.weight": "embedding.word.weight", "norm.weight": "final_norm.weight"}
    return special.get(name, name.replace(".project.", "."))
