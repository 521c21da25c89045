"""Tokenizers of a few hundred ids, made in milliseconds, and the text they are made from."""

from __future__ import annotations

import base64
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


def write_gpt2(huggingface: Path, folder: Path) -> Path:
    """The tokenizer of `write_huggingface` as vocab.json and merges.txt, with <|endoftext|> at id 300."""
    model = json.loads((huggingface / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": 300}))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in merges))
    return folder


def write_ranks(huggingface: Path, folder: Path) -> Path:
    """The same pieces as a tokenizer.model of tiktoken ranks, with the ids they have there."""
    model = json.loads((huggingface / "tokenizer.json").read_text())["model"]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    bytes_of = {**{chr(b): b for b in visible}, **{chr(256 + i): b for i, b in enumerate(others)}}
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    lines = [
        f"{base64.b64encode(bytes(map(bytes_of.__getitem__, piece))).decode()} {i}" for i, piece in enumerate(pieces)
    ]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return folder / "tokenizer.model"


def write_wordpiece(_: Path, folder: Path) -> Path:
    """A vocab.txt of letters, some words of `TEXT` and their ends."""
    letters = sorted({character for character in TEXT.lower() + TEXT if not character.isspace()})
    words = sorted({word.strip('.,?"') for word in TEXT.split()})[:60]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"[]<>_/", *letters, *(f"##{c}" for c in letters)]
    pieces += [*words, *(word.lower() for word in words), *(f"##{word[-3:]}" for word in words)]
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in dict.fromkeys(pieces)))
    return folder / "vocab.txt"
