"""Bytes of text files to text: UTF-8, and for other encodings what they look like and how to convert them."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

# The mark of UTF-32 begins with that of UTF-16, and is looked for first.
_MARKS: Final[Mapping[bytes, str]] = MappingProxyType(
    {
        codecs.BOM_UTF32_LE: "UTF-32",
        codecs.BOM_UTF32_BE: "UTF-32",
        codecs.BOM_UTF16_LE: "UTF-16",
        codecs.BOM_UTF16_BE: "UTF-16",
    }
)
_HEAD_BYTES: Final = 16


def decode_utf8(raw: bytes, *, is_first: bool) -> str:
    """The text of some lines; the first ones of a file may begin with a byte-order mark, which is no part of it.

    Raises UnicodeDecodeError, also where the text is UTF-16 and would pass for UTF-8 with a NUL in every other byte.
    """
    text = raw.decode("utf-8-sig" if is_first else "utf-8")
    if "\0" in text and _foreign_encoding(raw, is_first=is_first) is not None:
        raise UnicodeDecodeError("utf-8", raw, 0, 1, "a NUL in every other byte")
    return text


def reason_and_remedy(error: UnicodeDecodeError, *, is_first: bool) -> str:
    """The rest of a message that begins with the place of the error; `is_first` as for `decode_utf8`."""
    encoding = _foreign_encoding(error.object, is_first=is_first)
    if encoding is None:
        return (
            f"byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file, for example with "
            "`iconv -f latin1 -t UTF-8`."
        )
    return f"looks like {encoding[:6]}, not UTF-8; convert the file with `iconv -f {encoding} -t UTF-8`."


def _foreign_encoding(raw: bytes, *, is_first: bool) -> str | None:
    """UTF-16 or UTF-32 by the name that iconv knows it by, if the bytes begin as such text does."""
    if is_first:
        for mark, encoding in _MARKS.items():
            if raw.startswith(mark):
                return encoding
    # JSON begins with two characters of ASCII, and other text of Latin letters has mostly such.
    head = raw[:_HEAD_BYTES]
    high_first, low_first = head[::2].count(0), head[1::2].count(0)
    few, many = sorted((high_first, low_first))
    if few or many < max(2, len(head) // 4):
        return None
    if not is_first:  # lines are cut at the byte of their end, which may leave the other half of it in front
        return "UTF-16"
    return "UTF-16BE" if high_first else "UTF-16LE"
