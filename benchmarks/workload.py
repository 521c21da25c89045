"""What every side of every comparison trains: one model, one global batch, one optimizer, one set of initial weights.

Legend: m micro-batches of a global batch, b micro-batch size, s sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from megatron.core.sharding import Region
from megatron.model.config import ModelConfig
from megatron.model.flops import flops_per_token
from megatron.model.init import initial_value
from megatron.optimizer.config import OptimizerConfig

NUM_MICROBATCHES: Final = 4  # of the global batch, in every layout
SEED: Final = 7
ADAM: Final = OptimizerConfig(
    lr=3e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=0.0, lr_decay_iters=1
)


@dataclass(frozen=True)
class Size:
    """A Llama and the shape of its micro-batches."""

    name: str
    model: ModelConfig
    seq_length: int
    micro_batch_size: int

    @property
    def tokens_per_step(self) -> int:
        return NUM_MICROBATCHES * self.micro_batch_size * self.seq_length

    @property
    def flops_per_step(self) -> float:
        return flops_per_token(self.model, self.seq_length) * self.tokens_per_step


def _llama(*, layers: int, hidden: int, ffn: int, kv_heads: int, vocab: int, seq_length: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=8,
        num_attention_heads_kv=kv_heads,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        max_position_embeddings=seq_length,
        use_rms_norm=True,
        glu_activation="swiglu",
        position_embedding_type="rotary",
        tie_embed_logits=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


# XS is for trying the harness, not for reading its ratios.
SIZES: Final[Mapping[str, Size]] = MappingProxyType(
    {
        "XS": Size("XS", _llama(layers=2, hidden=64, ffn=128, kv_heads=4, vocab=512, seq_length=64), 64, 2),
        "S": Size("S", _llama(layers=4, hidden=256, ffn=688, kv_heads=4, vocab=4096, seq_length=256), 256, 4),
        "M": Size("M", _llama(layers=8, hidden=512, ffn=1376, kv_heads=8, vocab=8192, seq_length=512), 512, 2),
    }
)


def global_batch(size: Size) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each [m, b, s], the same in every step: the losses of all sides must fall alike."""
    shape = (NUM_MICROBATCHES, size.micro_batch_size, size.seq_length + 1)
    tokens = torch.randint(size.model.vocab_size, shape, generator=torch.Generator().manual_seed(SEED))
    return tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()


def whole_weight(size: Size, name: str, shape: tuple[int, ...]) -> Tensor:
    """The initial value of a whole logical tensor."""
    origin = (0,) * len(shape)
    return initial_value(size.model, SEED, Region(name, shape, origin, shape, origin))


def fused_adamw(module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the peers. As everywhere here, matrices decay and vectors do not."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": ADAM.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (ADAM.adam_beta1, ADAM.adam_beta2)
    return torch.optim.AdamW(groups, lr=ADAM.lr, betas=betas, eps=ADAM.adam_eps, fused=True)
