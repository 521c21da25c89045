"""The architecture of a model: every number that shapes its parameters or its function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    "linear" divides every frequency by `factor` (Chen et al. 2023, arXiv 2306.15595). "llama3" divides the
    low frequencies, keeps the high ones, and blends in between (Llama 3.1 model card).
    """

    type: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes left at None are derived in `__post_init__` and never None afterwards."""

    num_layers: int = field(metadata={"help": "number of transformer layers"})
    hidden_size: int = field(metadata={"help": "width of the residual stream"})
    num_attention_heads: int = field(metadata={"help": "number of query heads"})
    vocab_size: int = field(metadata={"help": "number of tokens with an embedding row, without padding"})
    max_position_embeddings: int = field(metadata={"help": "longest sequence the model is made for, in tokens"})
    num_attention_heads_kv: int = field(
        default=None, metadata={"help": "number of key/value heads; default: num_attention_heads"}
    )  # type: ignore[assignment]
    ffn_hidden_size: int = field(default=None, metadata={"help": "width of the MLP; default: 4 * hidden_size"})  # type: ignore[assignment]
    kv_channels: int = field(
        default=None, metadata={"help": "dimension of a head; default: hidden_size / num_attention_heads"}
    )  # type: ignore[assignment]
    use_rms_norm: bool = field(default=False, metadata={"help": "RMSNorm instead of LayerNorm"})
    layernorm_epsilon: float = field(default=1e-5, metadata={"help": "epsilon of every norm"})
    glu_activation: Literal["swiglu", "geglu", "liglu", "reglu"] | None = field(
        default=None, metadata={"help": "gated activation of the MLP; default: plain GELU"}
    )
    position_embedding_type: Literal["rotary", "absolute"] = field(
        default="absolute", metadata={"help": "rotary or learned absolute positions"}
    )
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary frequencies"})
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_embed_logits: bool = field(default=True, metadata={"help": "share the embedding matrix with the output head"})
    hidden_dropout: float = field(default=0.1, metadata={"help": "dropout on the residual stream"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout on attention probabilities"})
    init_method_std: float = field(default=0.02, metadata={"help": "standard deviation of initial weights"})

    def __post_init__(self) -> None:
        if self.num_attention_heads_kv is None:
            object.__setattr__(self, "num_attention_heads_kv", self.num_attention_heads)
        if self.ffn_hidden_size is None:
            object.__setattr__(self, "ffn_hidden_size", 4 * self.hidden_size)
        if self.kv_channels is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"--hidden_size {self.hidden_size} is not a multiple of --num_attention_heads "
                    f"{self.num_attention_heads}; change one of them or give --kv_channels."
                )
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_attention_heads_kv:
            raise ConfigError(
                f"--num_attention_heads {self.num_attention_heads} is not a multiple of --num_attention_heads_kv "
                f"{self.num_attention_heads_kv}; every key/value head serves the same number of query heads."
            )
