"""Masked language modelling (Devlin et al. 2018, arXiv 1810.04805, section 3.1): which tokens a model has to restore.

Legend: n tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron.errors import ConfigError
from megatron.tokenizer.protocol import Tokenizer
from megatron.tokenizer.wordpiece import word_continuations

# Of the chosen tokens, four in five are hidden and one in ten replaced; the others stay as they are.
_HIDDEN: Final = 0.8
_HIDDEN_OR_REPLACED: Final = 0.9


@dataclass(frozen=True)
class MaskedTokens:
    """The ids that a masked pair of texts needs. `continues`: bool [v], the ids inside of a word, if words are known.

    `vocab_size` bounds the ids that replace others.
    """

    cls: int
    sep: int
    mask: int
    pad: int
    vocab_size: int
    continues: np.ndarray | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> MaskedTokens:
        """Raises ConfigError for a tokenizer that lacks one of the four special tokens."""
        ids = {"cls": tokenizer.cls, "sep": tokenizer.sep, "mask": tokenizer.mask, "pad": tokenizer.pad}
        missing = [name for name, token in ids.items() if token is None]
        if missing:
            raise ConfigError(
                f"--tokenizer_type {tokenizer.name} has no {' and no '.join(missing)} token, which BERT's samples are "
                "made of; use BertWordPieceLowerCase or BertWordPieceCase, or a SentencePieceTokenizer without "
                "--no_new_tokens."
            )
        given = {name: token for name, token in ids.items() if token is not None}
        return cls(**given, vocab_size=tokenizer.vocab_size, continues=word_continuations(tokenizer))


def choose_tokens(starts_word: np.ndarray, probability: float, draws: np.ndarray) -> np.ndarray:
    """Whole words in random order until `probability` of the tokens is reached, at least one: bool [n].

    starts_word: bool [n], true for the first; draws: float64 [n] or more. A word that would go beyond is left out,
    unless none else fits.
    """
    if not len(starts_word):
        return np.zeros(0, dtype=bool)
    wanted = max(1, int(len(starts_word) * probability + 0.5))
    if starts_word.all():
        chosen = np.zeros(len(starts_word), dtype=bool)
        chosen[np.argsort(draws[: len(starts_word)])[:wanted]] = True
        return chosen
    word = np.cumsum(starts_word) - 1
    sizes = np.bincount(word)
    order = np.argsort(draws[: len(sizes)])
    is_chosen = np.zeros(len(sizes), dtype=bool)
    for number, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if size <= wanted:
            is_chosen[number] = True
            wanted -= size
        if not wanted:
            break
    if not is_chosen.any():
        is_chosen[order[0]] = True
    return is_chosen[word]


def hide(tokens: np.ndarray, chosen: np.ndarray, special: MaskedTokens, draws: np.ndarray) -> np.ndarray:
    """The tokens [n] with the chosen ones hidden, replaced by any others, or left. draws: float64 [2, n]."""
    fate, replacement = draws
    hidden = np.where(chosen & (fate < _HIDDEN), special.mask, tokens)
    is_replaced = chosen & (fate >= _HIDDEN) & (fate < _HIDDEN_OR_REPLACED)
    return np.where(is_replaced, (replacement * special.vocab_size).astype(np.int64), hidden)
