"""Samples as text: what the model sees, what of it counts in the loss, and where each document or text begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Final

import numpy as np
from rich.text import Text

from megatron.data.conversation import Role
from megatron.data.pieces import Piece
from megatron.data.sample import PairSample, Sample
from megatron.tokenizer import Tokenizer

_ROLE_STYLES: Final[Mapping[int, str]] = MappingProxyType(
    {Role.SYSTEM: "magenta", Role.PROMPTER: "cyan", Role.ASSISTANT: "green"}
)
_SPECIAL_ROLES: Final = ("bos", "eos", "pad", "eod", "cls", "sep", "mask")


class SampleText:
    """Renders samples with one tokenizer. With `marks`, ‹ and › stand around what does not count in running text."""

    def __init__(self, tokenizer: Tokenizer, *, marks: bool):
        self._tokenizer, self._marks = tokenizer, marks
        self._special = _special_names(tokenizer)

    def render(self, sample: Sample, pieces: Sequence[Piece], roles: np.ndarray | None = None) -> Text:
        """`roles`: [s + 1], of each token, where the data has them.

        A token counts if it is a label that counts; the first token is no label. Documents begin on a line of their
        own, which names them.
        """
        weights = np.concatenate(([0.0], sample.loss_mask)).tolist()
        kinds = [-1] * len(weights) if roles is None else roles.tolist()
        starts = [piece.start for piece in pieces]
        text = Text()
        for piece, start, stop in zip(pieces, starts, [*starts[1:], len(weights)], strict=True):
            text.append(f"── {_origin(piece)}\n", style="bold blue")
            for (weight, kind), numbers in groupby(range(start, stop), lambda i: (weights[i], kinds[i])):
                part = list(numbers)
                self._append(text, sample.tokens, part[0], part[-1] + 1, weight, kind)
            text.append("\n")
        return text

    def render_pair(self, sample: PairSample) -> Text:
        """A token that counts is {what the model sees→what it was}, with its blank; the others are dim."""
        length = int(np.count_nonzero(sample.segment_ids == 0))
        middle = int(np.argmax(sample.token_types))
        text = Text()
        for name, start, stop in (("first text, type 0", 0, middle), ("second text, type 1", middle, length)):
            text.append(f"── {name}\n", style="bold blue")
            for counts, numbers in groupby(range(start, stop), lambda i: bool(sample.loss_mask[i])):
                part = list(numbers)
                if counts:
                    self._append_to_restore(text, sample, part)
                else:
                    self._append_decoded(text, sample.labels, part[0], part[-1] + 1, "dim")
            text.append("\n")
        if length < len(sample.tokens):
            text.append(f"── padding, {len(sample.tokens) - length} tokens\n", style="bold blue")
        return text

    def _append(self, text: Text, tokens: np.ndarray, start: int, stop: int, weight: float, kind: int) -> None:
        style = " ".join(filter(None, [_ROLE_STYLES.get(kind, ""), "" if weight == 1 else "dim"]))
        marks = self._marks and weight != 1
        text.append(f"‹{'' if weight == 0 else f'{weight:g}: '}" if marks else "", style=style)
        self._append_decoded(text, tokens, start, stop, style)
        text.append("›" if marks else "")

    def _append_to_restore(self, text: Text, sample: PairSample, numbers: Sequence[int]) -> None:
        for i in numbers:
            text.append("{")
            # What stood before decides on a blank, not what is seen there.
            self._append_decoded(text, np.append(sample.labels[:i], sample.tokens[i]), i, i + 1, "")
            text.append("→")
            self._append_decoded(text, sample.labels, i, i + 1, "green")
            text.append("}")

    def _append_decoded(self, text: Text, tokens: np.ndarray, start: int, stop: int, style: str) -> None:
        for part, is_special in self._decoded(tokens, start, stop):
            text.append(part, style=f"{style} reverse".strip() if is_special else style)

    def _decoded(self, tokens: np.ndarray, start: int, stop: int) -> Iterator[tuple[str, bool]]:
        """Tokens start to before stop as texts, and whether each is a special token."""
        for is_special, numbers in groupby(range(start, stop), lambda i: int(tokens[i]) in self._special):
            part = list(numbers)
            if is_special:
                yield "".join(self._special[int(tokens[i])] for i in part), True
            else:
                yield self._decoded_after(tokens, part[0], part[-1] + 1), False

    def _decoded_after(self, tokens: np.ndarray, start: int, stop: int) -> str:
        """Some tokenizers drop the blank that a text begins with: the token before it keeps it in place."""
        ids = tokens[start:stop].tolist()
        if start == 0 or int(tokens[start - 1]) in self._special:
            return self._tokenizer.decode(ids)
        before = [int(tokens[start - 1])]
        head, whole = self._tokenizer.decode(before), self._tokenizer.decode(before + ids)
        return whole[len(head) :] if whole.startswith(head) else self._tokenizer.decode(ids)


def _special_names(tokenizer: Tokenizer) -> dict[int, str]:
    names = {id_: name for name, id_ in tokenizer.added_tokens.items()}
    for role in _SPECIAL_ROLES:
        id_ = getattr(tokenizer, role)
        if id_ is not None and id_ not in names:
            names[id_] = tokenizer.decode([id_]).strip() or f"<{role}>"
    return names


def _origin(piece: Piece) -> str:
    return f"document {piece.document}" + (f" from token {piece.offset}" if piece.offset else "")
