from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron.data import json_value
from megatron.data.json_value import described, parse_json_line

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
LINES = st.builds(lambda value, ascii: json.dumps(value, ensure_ascii=ascii).encode(), VALUES, st.booleans())
PIECES = [
    b'{"text": "',
    b'"}',
    b"\\u",
    b"\\ud83d",
    b"\\ude00",
    b"0041",
    b"a",
    b" ",
    b"\t",
    b"\0",
    b"\xff",
    b"\xc3\xa9",
    b"\\",
    b"\r",
]
DAMAGED = st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join)


def _outcome(raw: bytes, is_first: bool) -> object:
    try:
        return repr(parse_json_line(raw, is_first=is_first))
    except (ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.skipif(json_value.fast_loads() is None, reason="orjson is not installed: there is nothing to compare with")
@given(raw=LINES | DAMAGED | st.binary(max_size=20), is_first=st.booleans())
@example(raw=b'\xef\xbb\xbf{"text": "a"}', is_first=True)
@example(raw=b'\xef\xbb\xbf{"text": "a"}', is_first=False)
@example(raw=b'{"text": "a \\ud800 b"}', is_first=False)
@example(raw=b'{"a": NaN, "b": -Infinity}', is_first=False)
@example(raw=b'{"a": 1, "a": 2}', is_first=False)
@example(raw='{"text": "a"}'.encode("utf-16-le"), is_first=True)
def test_with_orjson_a_line_is_read_or_refused_as_without(raw, is_first):
    with_orjson = _outcome(raw, is_first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_value, "fast_loads", lambda: None)
        assert with_orjson == _outcome(raw, is_first)


@pytest.mark.parametrize("has_orjson", [True, False])
def test_lines_are_read_without_orjson_too(has_orjson, monkeypatch):
    if not has_orjson:
        monkeypatch.setattr(json_value, "fast_loads", lambda: None)
    assert parse_json_line(b'{"text": "caf\xc3\xa9 \\ud83d\\ude00"}', is_first=False) == {"text": "café \U0001f600"}
    with pytest.raises(UnicodeDecodeError):
        parse_json_line(b'{"text": "caf\xe9"}', is_first=False)
    with pytest.raises(json.JSONDecodeError):
        parse_json_line(b"{", is_first=False)


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "null"), (True, "true"), (5, "the number 5"), ("a", "a string"), ([], "a list"), ({}, "an object")],
)
def test_a_value_has_the_name_that_json_gives_it(value, name):
    assert described(value) == name
