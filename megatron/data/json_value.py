"""Values in JSON: one line read, and what a value is called in messages to those who wrote it."""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Callable

from megatron.data.utf8 import decode_utf8


def parse_json_line(raw: bytes, *, is_first: bool) -> object:
    """The value of one line, with or without its end; the first one of a file may begin with a byte-order mark.

    Raises UnicodeDecodeError, ValueError or RecursionError. A string may hold half a surrogate pair, as an escape can
    spell it.
    """
    if (loads := fast_loads()) is not None:
        try:
            return loads(raw)
        except ValueError:
            pass  # what it refuses may still be read below, or is refused in words that name the fault
    return json.loads(decode_utf8(raw.removesuffix(b"\n"), is_first=is_first))


@functools.cache
def fast_loads() -> Callable[[bytes], object] | None:
    """orjson's, where it is installed: it reads the same in half the time.

    But integers beyond 64 bits become floats, and lists may be nested 1024 deep, whatever Python's own limit is.
    """
    try:
        import orjson
    except ImportError:
        return None
    return orjson.loads


def described(value: object) -> str:
    """With its article: "a list", "an object", "the number 5", "null"."""
    match value:
        case None | bool():
            return json.dumps(value)
        case int() | float():
            return f"the number {reprlib.repr(value)}"
        case str():
            return "a string"
        case list():
            return "a list"
    return "an object"
