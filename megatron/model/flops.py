"""Floating-point operations of the model, counted as the literature does for MFU: no recomputation."""

from __future__ import annotations

from megatron.model.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters, without vocabulary padding."""
    h, d, f = config.hidden_size, config.kv_channels, config.ffn_hidden_size
    n, k = config.num_attention_heads, config.num_attention_heads_kv
    norm = h if config.use_rms_norm else 2 * h
    gates = 2 if config.glu_activation else 1
    num_norms = 1 if config.parallel_attn and not config.parallel_layernorm else 2
    layer = _matmul_parameters_of_layer(config) + num_norms * norm + (2 * d if config.qk_layernorm else 0)
    layer += ((n + 2 * k) * d if config.qkv_bias else 0) + (h if config.attention_output_bias else 0)
    layer += gates * f + h if config.mlp_bias else 0
    tables = config.vocab_size + config.num_token_types
    tables += config.max_position_embeddings if config.position_embedding_type == "absolute" else 0
    tables += 0 if config.tie_embed_logits else config.vocab_size
    norms_outside = int(config.embedding_layernorm) + int(config.bert_head or not config.use_post_ln)
    # Transform and pooler, the bias of each token, and the two numbers of a sentence.
    bert_head = 2 * (h * h + h) + config.vocab_size + 2 * h + 2 if config.bert_head else 0
    return config.num_layers * layer + tables * h + norms_outside * norm + bert_head


def flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """Forward and backward operations per token (Chowdhery et al. 2022, appendix B).

    6 per matmul parameter, and per layer 12 * n * d for each key that a token sees, on average: half of the sequence
    (with attention to the past only), less with a window.
    """
    matmul = config.num_layers * _matmul_parameters_of_layer(config) + _matmul_parameters_of_head(config)
    attention = config.num_layers * _keys_seen(config, seq_length) * config.num_attention_heads * config.kv_channels
    return 6.0 * matmul + 12.0 * attention


def _keys_seen(config: ModelConfig, seq_length: int) -> float:
    """By a token on average, in the limit of many tokens."""
    if config.bidirectional:
        return seq_length
    window = min(config.sliding_window_size or seq_length, seq_length)
    return window - window**2 / (2 * seq_length)


def _matmul_parameters_of_layer(config: ModelConfig) -> int:
    h, d, f = config.hidden_size, config.kv_channels, config.ffn_hidden_size
    attention = h * d * (2 * config.num_attention_heads + 2 * config.num_attention_heads_kv)
    return attention + h * f * (3 if config.glu_activation else 2)


def head_cost_in_layers(config: ModelConfig) -> float:
    """What the output projection costs, in units of one transformer layer's matmuls."""
    return _matmul_parameters_of_head(config) / _matmul_parameters_of_layer(config)


def _matmul_parameters_of_head(config: ModelConfig) -> int:
    """BERT's transform counts, its pooler, of one token in a sequence, does not."""
    transform = config.hidden_size**2 if config.bert_head else 0
    return config.vocab_size * config.hidden_size + transform
