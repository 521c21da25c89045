"""What a value is called in JSON, for messages to those who wrote it."""

from __future__ import annotations

import json
import reprlib


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
