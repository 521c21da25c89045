"""Resolved configurations of small runs, from the flags a user would type."""

from megatron.config import RunConfig, parse_run, resolve

FLAGS = {
    "num_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_attention_heads_kv": 2,
    "ffn_hidden_size": 96,
    "max_position_embeddings": 128,
    "use_rms_norm": None,
    "glu_activation": "swiglu",
    "position_embedding_type": "rotary",
    "no_tie_embed_logits": None,
    "hidden_dropout": 0,
    "attention_dropout": 0,
    "micro_batch_size": 2,
    "train_iters": 100,
    "lr": 1e-3,
    "data_path": "tokens",
}


def small_run(world_size: int = 1, vocab_size: int = 1031, **flags: object) -> RunConfig:
    """`FLAGS` with `flags` on top; None is a flag without a value, and False leaves one out."""
    tokens: list[str] = []
    for name, value in {**FLAGS, **flags}.items():
        if value is not False:
            tokens += [f"--{name}"] if value is None else [f"--{name}={value}"]
    return resolve(parse_run(tokens), world_size, tokenizer_vocab_size=vocab_size)
