"""Tokenizers of a few hundred ids, made in milliseconds, and the text they are made from."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from megatron.tokenizer.train import train_sentencepiece

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
    "a wife.\n\nHowever little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered the "
    'rightful property of some one or other of their daughters.\n"My dear Mr. Bennet," said his lady to him one day, '
    '"have you heard that Netherfield Park is let at last?"\nMr. Bennet replied that he had not.\n'
)
SENTENCEPIECE_PIECES = 320


def write_sentencepiece(folder: Path) -> Path:
    """A tokenizer.model of 320 pieces without padding piece; bos 1, eos 2."""
    model_file = folder / "tokenizer.model"
    train_sentencepiece([TEXT], model_file, vocab_size=SENTENCEPIECE_PIECES)
    return model_file


def write_huggingface(folder: Path, special: tuple[str, ...] = ("<|begin|>", "<|end|>"), **config: object) -> Path:
    """A folder with a byte-level BPE tokenizer.json, ids 0 to 299 and then `special`, and a tokenizer_config.json."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([TEXT], trainer)
    model.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
