"""What a SentencePiece tokenizer.model says about itself, read from its protocol buffer.

The library's own interface tells neither the types of all pieces nor how text is normalized. Field numbers are those of
sentencepiece_model.proto; a field that is not named here is skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from megatron.errors import TokenizerError


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in the order of their ids, the algorithm, and what is done to a text before it is cut."""

    pieces: tuple[Piece, ...]
    type: ModelType
    byte_fallback: bool
    whitespace_is_suffix: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_sentencepiece(proto: bytes) -> SentencePieceModel:
    """Raises TokenizerError if `proto` is no SentencePiece model."""
    try:
        fields = list(_fields(proto))
        trainer = dict(_fields(_last(fields, 2)))
        normalizer = dict(_fields(_last(fields, 3)))
        return SentencePieceModel(
            pieces=tuple(_piece(_bytes(value)) for number, value in fields if number == 1),
            type=ModelType(int(trainer.get(3, ModelType.UNIGRAM))),
            byte_fallback=bool(trainer.get(35, False)),
            whitespace_is_suffix=bool(trainer.get(24, False)),
            charsmap=_bytes(normalizer.get(2, b"")),
            add_dummy_prefix=bool(normalizer.get(3, True)),
            remove_extra_whitespaces=bool(normalizer.get(4, True)),
            escape_whitespaces=bool(normalizer.get(5, True)),
        )
    except (IndexError, ValueError, struct.error) as error:
        raise TokenizerError(
            f"the tokenizer.model is no SentencePiece model ({error}); copy it again from the model."
        ) from error


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    score = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))[0]
    return Piece(_bytes(fields.get(1, b"")).decode(), score, PieceType(int(fields.get(3, PieceType.NORMAL))))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field: an integer for a varint, otherwise the bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + length > len(message):
            raise ValueError("a field is cut off")
        yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _last(fields: list[tuple[int, int | bytes]], number: int) -> bytes:
    return next((_bytes(value) for n, value in reversed(fields) if n == number), b"")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text belongs")
    return value
