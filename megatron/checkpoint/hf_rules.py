"""How each family of models is spelled in Hugging Face's format: one table a family, read in both directions.

The tables hold no code; `hf_family` explains their words. Which of a module's tensors a model has (a bias, a head of
its own) follows from its `ModelConfig`. Defaults are those of transformers for the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final

from megatron.checkpoint.hf_family import ConfigChoice, ConfigKey, Family, Setting, StoredModule


def _required(key: str, field: str, alias: str | None = None) -> ConfigKey:
    return ConfigKey(key, field, int, required=True, alias=alias)


def _modules(names: Mapping[str, str], *, transposed: bool = False) -> tuple[StoredModule, ...]:
    """Modules that are called otherwise there, and nothing else; native names first."""
    return tuple(StoredModule(hf, (native,), transposed=transposed) for native, hf in names.items())


def _implied(**fields: Any) -> Mapping[str, Any]:
    return MappingProxyType(fields)


_SILU: Final = Setting("hidden_act", ("silu", "swish"), "silu")
_GELUS: Final[Mapping[str, str]] = MappingProxyType(
    {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
)

_LLAMA_SIZES: Final = (
    _required("vocab_size", "vocab_size"),
    _required("hidden_size", "hidden_size"),
    _required("intermediate_size", "ffn_hidden_size"),
    _required("num_hidden_layers", "num_layers"),
    _required("num_attention_heads", "num_attention_heads"),
    _required("max_position_embeddings", "max_position_embeddings"),
    ConfigKey("rms_norm_eps", "layernorm_epsilon", float, 1e-6),
    ConfigKey("attention_dropout", "attention_dropout", float, 0.0),
    ConfigKey("initializer_range", "init_method_std", float, 0.02),
)
_ATTENTION_BIASES: Final = (
    ConfigKey("attention_bias", "qkv_bias", bool, False),
    ConfigKey("attention_bias", "attention_output_bias", bool, False),
)
_HEAD_DIM: Final = ConfigKey("head_dim", "kv_channels", int)
_TIED_HEAD: Final = MappingProxyType({"lm_head.weight": "embedding.word.weight"})
_UNTIED: Final = ConfigKey("tie_word_embeddings", "tie_embed_logits", bool, False)
_TIED: Final = replace(_UNTIED, default=True)


def _kv_heads(default: int | None) -> ConfigKey:
    return ConfigKey("num_key_value_heads", "num_attention_heads_kv", int, default, null_is_derived=True)


LLAMA: Final = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    modules=_modules(
        {
            "embedding.word": "model.embed_tokens",
            "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm",
            "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
            "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
            "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
            "layers.{i}.attention.q_norm": "model.layers.{i}.self_attn.q_norm",
            "layers.{i}.attention.k_norm": "model.layers.{i}.self_attn.k_norm",
            "layers.{i}.attention.output": "model.layers.{i}.self_attn.o_proj",
            "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
            "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
            "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
            "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
            "final_norm": "model.norm",
            "head": "lm_head",
        }
    ),
    keys=(
        *_LLAMA_SIZES,
        *_ATTENTION_BIASES,
        _kv_heads(None),
        _HEAD_DIM,
        _UNTIED,
        ConfigKey("mlp_bias", "mlp_bias", bool, False),
    ),
    implied=_implied(use_rms_norm=True, glu_activation="swiglu", position_embedding_type="rotary", hidden_dropout=0.0),
    settings=(_SILU,),
    ignored=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),
    tied_copies=_TIED_HEAD,
)

MISTRAL: Final = replace(
    LLAMA,
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    keys=(*_LLAMA_SIZES, _kv_heads(8), _HEAD_DIM, _UNTIED),
    window="key",
)

QWEN2: Final = replace(
    LLAMA,
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    keys=(*_LLAMA_SIZES, _kv_heads(32), _HEAD_DIM, _UNTIED),
    implied=_implied(**LLAMA.implied, qkv_bias=True),
    window="layers",
)

QWEN3: Final = replace(
    LLAMA,
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    keys=(*_LLAMA_SIZES, *_ATTENTION_BIASES, _kv_heads(32), replace(_HEAD_DIM, default=128), _UNTIED),
    implied=_implied(**LLAMA.implied, qk_layernorm=True),
    window="layers",
)

GEMMA: Final = replace(
    LLAMA,
    model_type="gemma",
    architectures=("GemmaForCausalLM",),
    keys=(*_LLAMA_SIZES, *_ATTENTION_BIASES, _kv_heads(16), replace(_HEAD_DIM, default=256), _TIED),
    implied=_implied(
        **{**LLAMA.implied, "glu_activation": "geglu_tanh"}, apply_layernorm_1p=True, scale_embeddings=True
    ),
    settings=(
        # transformers takes "gelu" for the tanh approximation here, which the first files meant by it.
        Setting("hidden_act", ("gelu_pytorch_tanh", "gelu", "gelu_new"), "gelu_pytorch_tanh"),
        Setting("hidden_activation", ("gelu_pytorch_tanh", "gelu_new", None), None),
        Setting("use_bidirectional_attention", (None, False), None),
    ),
)

_FALCON_KEYS: Final = (
    _required("vocab_size", "vocab_size"),
    _required("hidden_size", "hidden_size", alias="n_embed"),
    _required("num_hidden_layers", "num_layers"),
    _required("num_attention_heads", "num_attention_heads"),
    ConfigKey("ffn_hidden_size", "ffn_hidden_size", int),
    ConfigKey("max_position_embeddings", "max_position_embeddings", int, 2048),
    ConfigKey("layer_norm_epsilon", "layernorm_epsilon", float, 1e-5),
    ConfigKey("bias", "qkv_bias", bool, False),
    ConfigKey("bias", "attention_output_bias", bool, False),
    ConfigKey("bias", "mlp_bias", bool, False),
    _TIED,
    ConfigKey("hidden_dropout", "hidden_dropout", float, 0.0),
    ConfigKey("attention_dropout", "attention_dropout", float, 0.0),
    ConfigKey("initializer_range", "init_method_std", float, 0.02),
)
_FALCON_IMPLIED: Final = _implied(use_rms_norm=False, position_embedding_type="rotary", parallel_attn=True)
_NO_ALIBI: Final = Setting("alibi", (False, None), False)
_OLD_DECODER: Final = Setting("new_decoder_architecture", (False, None), False)
_NEW_DECODER: Final = Setting("new_decoder_architecture", (True,), False)
_PARALLEL: Final = Setting("parallel_attn", (True,), True)
_SEQUENTIAL: Final = Setting("parallel_attn", (False, None), True)
_MULTI_QUERY: Final = Setting("multi_query", (True,), True)
_MULTI_HEAD: Final = Setting("multi_query", (False, None), True)
_FALCON_HEADS_KV: Final = ConfigKey("num_kv_heads", "num_attention_heads_kv", int)

_FALCON_MODULES: Final = (
    *_modules(
        {
            "embedding.word": "transformer.word_embeddings",
            "layers.{i}.attention.output": "transformer.h.{i}.self_attention.dense",
            "layers.{i}.mlp.up": "transformer.h.{i}.mlp.dense_h_to_4h",
            "layers.{i}.mlp.down": "transformer.h.{i}.mlp.dense_4h_to_h",
            "final_norm": "transformer.ln_f",
            "head": "lm_head",
        }
    ),
    StoredModule(
        "transformer.h.{i}.self_attention.query_key_value",
        ("layers.{i}.attention.q", "layers.{i}.attention.k", "layers.{i}.attention.v"),
        order="grouped",
    ),
)

# As in the 7B model: one norm before attention and MLP, one key/value head.
FALCON: Final = Family(
    model_type="falcon",
    architectures=("FalconForCausalLM",),
    modules=(
        *_FALCON_MODULES,
        *_modules(
            {
                "layers.{i}.attention_norm": "transformer.h.{i}.input_layernorm",
                "layers.{i}.mlp_norm": "transformer.h.{i}.post_attention_layernorm",
            }
        ),
    ),
    keys=_FALCON_KEYS,
    implied=_implied(**_FALCON_IMPLIED, num_attention_heads_kv=1),
    settings=(_NO_ALIBI, _OLD_DECODER, _MULTI_QUERY, _PARALLEL, Setting("num_ln_in_parallel_attn", (None, 1), None)),
    choices=(ConfigChoice("activation", "mlp_activation", _GELUS, "gelu"),),
    prefix="transformer.",
    ignored=("h.{i}.self_attention.rotary_emb.inv_freq",),
    tied_copies=_TIED_HEAD,
)
_FALCON_MULTI_HEAD: Final = replace(
    FALCON,
    # As many key/value heads as query heads: the number is not read.
    implied=_FALCON_IMPLIED,
    settings=(_NO_ALIBI, _OLD_DECODER, _MULTI_HEAD, _PARALLEL, Setting("num_ln_in_parallel_attn", (None, 1), None)),
)
_FALCON_SEQUENTIAL: Final = replace(
    FALCON,
    implied=_implied(**{**FALCON.implied, "parallel_attn": False}),
    settings=(_NO_ALIBI, _OLD_DECODER, _MULTI_QUERY, _SEQUENTIAL),
)
_FALCON_SEQUENTIAL_MULTI_HEAD: Final = replace(
    FALCON,
    implied=_implied(**{**_FALCON_IMPLIED, "parallel_attn": False}),
    settings=(_NO_ALIBI, _OLD_DECODER, _MULTI_HEAD, _SEQUENTIAL),
)
# As in the 40B model: a norm before the attention and one before the MLP.
FALCON_NEW: Final = replace(
    FALCON,
    modules=(
        *_FALCON_MODULES,
        *_modules(
            {
                "layers.{i}.attention_norm": "transformer.h.{i}.ln_attn",
                "layers.{i}.mlp_norm": "transformer.h.{i}.ln_mlp",
            }
        ),
    ),
    keys=(*_FALCON_KEYS, _FALCON_HEADS_KV),
    implied=_implied(**_FALCON_IMPLIED, parallel_layernorm=True),
    settings=(_NO_ALIBI, _NEW_DECODER, _PARALLEL, Setting("num_ln_in_parallel_attn", (2, None), None)),
)
# As in the 11B model: the new attention, and one norm.
_FALCON_NEW_ONE_NORM: Final = replace(
    FALCON,
    keys=(*_FALCON_KEYS, _FALCON_HEADS_KV),
    implied=_FALCON_IMPLIED,
    settings=(_NO_ALIBI, _NEW_DECODER, _PARALLEL, Setting("num_ln_in_parallel_attn", (1,), None)),
)

GPT2: Final = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    modules=(
        *_modules(
            {
                "embedding.word": "transformer.wte",
                "embedding.position": "transformer.wpe",
                "layers.{i}.attention_norm": "transformer.h.{i}.ln_1",
                "layers.{i}.mlp_norm": "transformer.h.{i}.ln_2",
                "final_norm": "transformer.ln_f",
                "head": "lm_head",
            }
        ),
        *_modules(
            {
                "layers.{i}.attention.output": "transformer.h.{i}.attn.c_proj",
                "layers.{i}.mlp.up": "transformer.h.{i}.mlp.c_fc",
                "layers.{i}.mlp.down": "transformer.h.{i}.mlp.c_proj",
            },
            transposed=True,
        ),
        StoredModule(
            "transformer.h.{i}.attn.c_attn",
            ("layers.{i}.attention.q", "layers.{i}.attention.k", "layers.{i}.attention.v"),
            transposed=True,
        ),
    ),
    keys=(
        _required("vocab_size", "vocab_size"),
        _required("n_embd", "hidden_size", alias="hidden_size"),
        _required("n_layer", "num_layers", alias="num_hidden_layers"),
        _required("n_head", "num_attention_heads", alias="num_attention_heads"),
        _required("n_positions", "max_position_embeddings", alias="max_position_embeddings"),
        ConfigKey("n_inner", "ffn_hidden_size", int),
        ConfigKey("layer_norm_epsilon", "layernorm_epsilon", float, 1e-5),
        _TIED,
        # One dropout here stands for both there; where they differ, that of the residual stream counts.
        ConfigKey("embd_pdrop", "hidden_dropout", float, 0.1),
        ConfigKey("resid_pdrop", "hidden_dropout", float, 0.1),
        ConfigKey("attn_pdrop", "attention_dropout", float, 0.1),
        ConfigKey("initializer_range", "init_method_std", float, 0.02),
    ),
    implied=_implied(
        use_rms_norm=False,
        position_embedding_type="absolute",
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    ),
    settings=(
        Setting("scale_attn_weights", (True,), True),
        Setting("scale_attn_by_inverse_layer_idx", (False,), False),
        Setting("add_cross_attention", (False,), False),
    ),
    choices=(
        ConfigChoice(
            "activation_function",
            "mlp_activation",
            MappingProxyType({"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}),
            "gelu_new",
        ),
    ),
    prefix="transformer.",
    ignored=("h.{i}.attn.bias", "h.{i}.attn.masked_bias"),
    tied_copies=_TIED_HEAD,
)

BERT: Final = Family(
    model_type="bert",
    # The published files say BertForMaskedLM and hold both heads; a file without the other head is an error.
    architectures=("BertForPreTraining", "BertForMaskedLM"),
    modules=_modules(
        {
            "embedding.word": "bert.embeddings.word_embeddings",
            "embedding.position": "bert.embeddings.position_embeddings",
            "embedding.token_type": "bert.embeddings.token_type_embeddings",
            "embedding.norm": "bert.embeddings.LayerNorm",
            "layers.{i}.attention.q": "bert.encoder.layer.{i}.attention.self.query",
            "layers.{i}.attention.k": "bert.encoder.layer.{i}.attention.self.key",
            "layers.{i}.attention.v": "bert.encoder.layer.{i}.attention.self.value",
            "layers.{i}.attention.output": "bert.encoder.layer.{i}.attention.output.dense",
            "layers.{i}.attention_norm": "bert.encoder.layer.{i}.attention.output.LayerNorm",
            "layers.{i}.mlp.up": "bert.encoder.layer.{i}.intermediate.dense",
            "layers.{i}.mlp.down": "bert.encoder.layer.{i}.output.dense",
            "layers.{i}.mlp_norm": "bert.encoder.layer.{i}.output.LayerNorm",
            "pooler": "bert.pooler.dense",
            "head": "cls.predictions",  # its bias; the weight is the embedding
            "head.transform": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "next_sentence": "cls.seq_relationship",
        }
    ),
    keys=(
        _required("vocab_size", "vocab_size"),
        _required("hidden_size", "hidden_size"),
        _required("intermediate_size", "ffn_hidden_size"),
        _required("num_hidden_layers", "num_layers"),
        _required("num_attention_heads", "num_attention_heads"),
        _required("max_position_embeddings", "max_position_embeddings"),
        ConfigKey("type_vocab_size", "num_token_types", int, 2),
        ConfigKey("layer_norm_eps", "layernorm_epsilon", float, 1e-12),
        ConfigKey("hidden_dropout_prob", "hidden_dropout", float, 0.1),
        ConfigKey("attention_probs_dropout_prob", "attention_dropout", float, 0.1),
        ConfigKey("initializer_range", "init_method_std", float, 0.02),
    ),
    implied=_implied(
        use_rms_norm=False,
        position_embedding_type="absolute",
        use_post_ln=True,
        bidirectional=True,
        embedding_layernorm=True,
        bert_head=True,
        tie_embed_logits=True,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    ),
    settings=(
        Setting("hidden_act", ("gelu", "gelu_python"), "gelu"),
        Setting("position_embedding_type", ("absolute",), "absolute"),
        Setting("tie_word_embeddings", (True,), True),
        Setting("is_decoder", (False,), False),
        Setting("add_cross_attention", (False,), False),
    ),
    prefix="bert.",
    ignored=("embeddings.position_ids",),
    renamed=MappingProxyType({"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}),
    tied_copies=MappingProxyType(
        {"cls.predictions.decoder.weight": "embedding.word.weight", "cls.predictions.decoder.bias": "head.bias"}
    ),
)

# Where several tables say a model equally well, the first is written.
FAMILIES: Final[tuple[Family, ...]] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    FALCON,
    _FALCON_MULTI_HEAD,
    FALCON_NEW,
    _FALCON_NEW_ONE_NORM,
    _FALCON_SEQUENTIAL,
    _FALCON_SEQUENTIAL_MULTI_HEAD,
    GPT2,
    BERT,
)
