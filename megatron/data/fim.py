"""Fill in the middle: documents of a sample rearranged, so that a model learns to write what fits between two texts.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle". A document is cut into prefix,
middle and suffix at two characters drawn at random, and becomes one of

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

Legend: s sequence length of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from megatron.data.draws import stream, uniforms
from megatron.errors import ConfigError
from megatron.tokenizer import Tokenizer

# Prefix, middle and suffix: StarCoder's, Qwen's, Code Llama's.
_KNOWN_TOKENS: Final = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    ("▁<PRE>", "▁<MID>", "▁<SUF>"),
    ("<PRE>", "<MID>", "<SUF>"),
)


@dataclass(frozen=True)
class FimTokens:
    prefix: int
    middle: int
    suffix: int


def find_fim_tokens(tokenizer: Tokenizer, names: Sequence[str] = ()) -> FimTokens:
    """The ids of the three `names`, by default of those that published models use. Raises ConfigError without them."""
    for known in [tuple(names)] if names else _KNOWN_TOKENS:
        ids = [tokenizer.token_id(name) for name in known]
        if None not in ids:
            return FimTokens(*(id_ for id_ in ids if id_ is not None))
    wanted = (
        f"--fim_tokens {' '.join(names)}: not all are tokens" if names else "--fim_rate: there is none of the tokens"
    )
    raise ConfigError(
        f"{wanted} of the {tokenizer.identity.type} for prefix, middle and suffix; add them with "
        "--vocab_extra_ids_list '<fim_prefix>,<fim_middle>,<fim_suffix>', or name this tokenizer's own by --fim_tokens."
    )


@dataclass(frozen=True)
class FillInMiddle:
    """Rearranges a document with probability `rate`, as SPM with probability `spm_rate`; `key` and a number decide.

    The token `eod` stays at the end of its document. The last documents make room for the tokens that are added.
    """

    tokenizer: Tokenizer
    tokens: FimTokens
    rate: float
    spm_rate: float
    key: int

    def of_dataset(self, number: int) -> FillInMiddle:
        """Other draws for each dataset of a blend."""
        return replace(self, key=stream(self.key, number))

    def __call__(
        self, number: int, tokens: np.ndarray, num_filled: int, starts: np.ndarray
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """tokens: int64 [s + 1], the first `num_filled` are of documents that begin at `starts`, int32 [k] -> the same.

        `number` is the sample's.
        """
        changed, firsts = tokens[:0], []
        for i, (start, end) in enumerate(zip(starts.tolist(), [*starts[1:].tolist(), num_filled], strict=True)):
            if len(changed) < len(tokens):
                firsts.append(len(changed))
                key, room = stream(stream(self.key, number), i), len(tokens) - len(changed)
                changed = np.concatenate([changed, self._fitted(key, tokens[start:end], room)])
        padded = np.zeros_like(tokens)
        padded[: len(changed)] = changed
        return padded, len(changed), np.array(firsts, dtype=np.int32)

    def _fitted(self, key: int, tokens: np.ndarray, room: int) -> np.ndarray:
        """A document whose end is cut off first where it would be too long: a middle that is learnt must be whole."""
        while True:
            document = self._document(key, tokens)
            excess = len(document) - room
            if excess <= 0:
                return document
            if excess >= len(tokens):
                return tokens[:room]
            tokens = tokens[:-excess]

    def _document(self, key: int, tokens: np.ndarray) -> np.ndarray:
        is_fim, is_spm, first, second = uniforms(key, 4).tolist()
        if is_fim >= self.rate or len(tokens) == 0:
            return tokens
        end = tokens[-1:] if tokens[-1] == self.tokenizer.eod else tokens[:0]
        prefix, middle, suffix = self._cut(tokens[: len(tokens) - len(end)], *sorted((first, second)))
        ids = self.tokens
        if is_spm < self.spm_rate:
            return np.concatenate([[ids.prefix, ids.suffix], suffix, [ids.middle], prefix, middle, end])
        return np.concatenate([[ids.prefix], prefix, [ids.suffix], suffix, [ids.middle], middle, end])

    def _cut(self, tokens: np.ndarray, first: float, second: float) -> list[np.ndarray]:
        """Three parts, cut at these shares of the characters; between tokens where a text is not what its tokens say.

        Half a character at the border of a sample does not become the same tokens again, for example.
        """
        text = self.tokenizer.decode(tokens.tolist())
        at, to = (int(share * (len(text) + 1)) for share in (first, second))
        texts = [text[:at], text[at:to], text[to:]]
        parts = [self.tokenizer.encode(part) for part in texts]
        if [self.tokenizer.decode(part) for part in parts] == texts and self.tokenizer.encode(text) == tokens.tolist():
            return [np.array(part, dtype=np.int64) for part in parts]
        return np.split(tokens, [int(share * (len(tokens) + 1)) for share in (first, second)])
