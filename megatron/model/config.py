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
    """A transformer. Sizes left at None are derived in `__post_init__` and never None afterwards.

    A field that was added later has the default that means what models did before it: stored configurations lack it.
    """

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
    glu_activation: Literal["swiglu", "geglu", "geglu_tanh", "liglu", "reglu"] | None = field(
        default=None, metadata={"help": "gated activation of the MLP; default: none, see mlp_activation"}
    )
    mlp_activation: Literal["gelu", "gelu_tanh"] = field(
        default="gelu", metadata={"help": "activation of an MLP without a gate: GELU, or its approximation by a tanh"}
    )
    position_embedding_type: Literal["rotary", "absolute"] = field(
        default="absolute", metadata={"help": "rotary or learned absolute positions"}
    )
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary frequencies"})
    rope_scaling: RopeScaling | None = None
    sliding_window_size: int | None = field(
        default=None, metadata={"help": "a token attends to this many last positions, its own included; default: all"}
    )
    parallel_attn: bool = field(
        default=False,
        metadata={"help": "attention and MLP side by side: both read the same norm and are added (Falcon)"},
    )
    parallel_layernorm: bool = field(
        default=False, metadata={"help": "with --parallel_attn: the MLP has a norm of its own (Falcon 40B)"}
    )
    qk_layernorm: bool = field(
        default=False, metadata={"help": "RMSNorm of every query and key head, before rotation (Qwen3)"}
    )
    apply_layernorm_1p: bool = field(
        default=False, metadata={"help": "norms multiply by 1 + weight, and weights start at 0 (Gemma)"}
    )
    scale_embeddings: bool = field(
        default=False, metadata={"help": "multiply word embeddings by sqrt(hidden_size) (Gemma)"}
    )
    use_post_ln: bool = field(
        default=False, metadata={"help": "norms behind the sums of attention and MLP, not before these (BERT)"}
    )
    bidirectional: bool = False  # a token attends to those after it as well
    num_token_types: int = 0  # learned vectors that tell apart the texts of a sample
    embedding_layernorm: bool = False  # on the sum of all embeddings
    bert_head: bool = False  # masked tokens and next sentence: `megatron.model.bert.BertHead`
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    tie_embed_logits: bool = field(default=True, metadata={"help": "share the embedding matrix with the output head"})
    hidden_dropout: float = field(default=0.1, metadata={"help": "dropout on the residual stream"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout on attention probabilities"})
    init_method_std: float = field(default=0.02, metadata={"help": "standard deviation of initial weights"})

    def __post_init__(self) -> None:
        """Raises ConfigError for what no model can have."""
        self._derive_sizes()
        self._check_block()

    def _derive_sizes(self) -> None:
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

    def _check_block(self) -> None:
        if self.parallel_layernorm and not self.parallel_attn:
            raise ConfigError(
                "--parallel_layernorm gives the MLP beside the attention a norm of its own, and without "
                "--parallel_attn they are not side by side; add it, or drop --parallel_layernorm."
            )
        if self.use_post_ln and self.parallel_attn:
            raise ConfigError(
                "--use_post_ln has a norm between attention and MLP, and --parallel_attn puts them side by side; "
                "drop one of them."
            )
        if self.bidirectional and self.sliding_window_size is not None:
            raise ConfigError(
                f"--sliding_window_size {self.sliding_window_size} is a window on the past, and this model attends "
                "both ways; drop it."
            )
        if self.sliding_window_size is not None and self.sliding_window_size < 1:
            raise ConfigError(
                f"--sliding_window_size {self.sliding_window_size} leaves a token nothing to attend to; use 1 or more, "
                "or leave it out to attend to everything before."
            )
        if self.glu_activation is not None and self.mlp_activation != "gelu":
            raise ConfigError(
                f"--mlp_activation {self.mlp_activation} is of an MLP without a gate, and --glu_activation is "
                f"{self.glu_activation}; drop one of them (geglu_tanh is the gated one)."
            )
