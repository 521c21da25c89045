from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.documents import check_inputs, parse_chunk, read_chunks, read_texts
from megatron.errors import DataError


def _write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _texts(path: Path, key: str = "text") -> list[str]:
    return list(read_texts([path], key))


def test_every_json_line_is_a_document_and_blank_lines_are_none(tmp_path):
    file = _write(tmp_path / "a.jsonl", '{"text": "one\\ntwo"}\r\n\n  \n{"text": "", "n": 1}\n{"text": "é"}')
    assert _texts(file) == ["one\ntwo", "", "é"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert _texts(_write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}')) == ["a"]
    assert _texts(_write(tmp_path / "a.txt", b"\xef\xbb\xbfa")) == ["a"]


def test_plain_text_without_two_blank_lines_is_one_document(tmp_path):
    assert _texts(_write(tmp_path / "a.txt", "one\n\ntwo\r\nthree\n")) == ["one\n\ntwo\nthree"]


def test_plain_text_is_cut_at_two_or_more_blank_lines(tmp_path):
    file = _write(tmp_path / "a.txt", "\n\n\nChapter 1\n\none\n\n \nChapter 2\r\n\r\n\r\n\r\n\r\nChapter 3\n\n\n")
    assert _texts(file) == ["Chapter 1\n\none", "Chapter 2", "Chapter 3"]


def test_a_chunk_ends_at_the_number_of_documents_or_of_bytes(tmp_path):
    line = b'{"text": "a"}\n'
    first, second = _write(tmp_path / "a.jsonl", 5 * line), _write(tmp_path / "b.jsonl", line)
    by_documents = list(read_chunks([first, second], max_documents=2, max_bytes=1000))
    assert [len(parse_chunk(chunk, ("text",))) for chunk in by_documents] == [2, 2, 1, 1]
    by_bytes = list(read_chunks([first, second], max_documents=99, max_bytes=3 * len(line)))
    assert [(chunk.path, chunk.num_bytes) for chunk in by_bytes] == [
        (first, 3 * len(line)),
        (first, 2 * len(line)),
        (second, len(line)),
    ]
    assert [chunk.done_bytes for chunk in by_bytes] == [3 * len(line), 5 * len(line), 6 * len(line)]


@given(st.lists(st.sampled_from(["a\n", "\n", " \n", "b\r\n", "\r\n", "c"])).map("".join), st.integers(1, 3))
def test_chunks_cover_every_byte_number_every_line_and_can_be_continued_behind_any(
    tmp_path_factory, content, max_documents
):
    for suffix in (".txt", ".jsonl"):
        text = content if suffix == ".txt" else re.sub("([abc]+)", r'{"text": "\1"}', content.replace("\r", ""))
        file = _write(tmp_path_factory.mktemp("chunks") / f"a{suffix}", text)
        limits = {"max_documents": max_documents, "max_bytes": 4}
        chunks = list(read_chunks([file], **limits))
        assert sum(chunk.num_bytes for chunk in chunks) == check_inputs([file])
        documents = [document for chunk in chunks for document in parse_chunk(chunk, ("text",))]
        lines = text.split("\n")
        for number, (found,) in documents:
            assert found.split("\n")[0] in "\n".join(lines[number - 1 :]).lstrip().split("\n")[0]
        for i, chunk in enumerate(chunks):
            rest = [
                d for later in read_chunks([file], start=chunk.end, **limits) for d in parse_chunk(later, ("text",))
            ]
            assert rest == [d for later in chunks[i + 1 :] for d in parse_chunk(later, ("text",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"a\.jsonl:2: not JSON \(.*\); every line must be one JSON object"),
        ("[" * 100_000, r"a\.jsonl:2: not "),
        ('["a"]', r"a\.jsonl:2: a list, not a JSON object"),
        ('{"body": "a", "id": 1}', r"a\.jsonl:2: no key 'text', the object has 'body', 'id'; .*--json_keys"),
        ("{}", r"a\.jsonl:2: no key 'text', the object has none"),
        ('{"text": 5}', r"a\.jsonl:2: 'text' holds the number 5, not a string; --json_keys names text only"),
        ('{"text": null}', r"a\.jsonl:2: 'text' holds null, not a string"),
        ('{"text": {"a": 1}}', r"a\.jsonl:2: 'text' holds an object, not a string"),
        ("true", r"a\.jsonl:2: true, not a JSON object"),
        ("9" * 200, r"a\.jsonl:2: the number (99[9.]{30,40}|1e\+200), not a JSON object"),
        ('"a"', r"a\.jsonl:2: a string, not a JSON object"),
        ('{"text": "a \\ud800 b"}', r"a\.jsonl:2: 'text' holds half a surrogate pair \('\\ud800'\)"),
        (b'{"text": "caf\xe9"}', r"a\.jsonl:2: byte 0xe9 is not UTF-8; .*iconv"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    file = _write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        _texts(file)


def test_a_bad_byte_of_plain_text_is_named_by_its_own_line(tmp_path):
    file = _write(tmp_path / "a.txt", b"one\n\n\ntwo\n\nthree \xff\n")
    with pytest.raises(DataError, match=r"a\.txt:6: byte 0xff is not UTF-8"):
        _texts(file)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "mark"])
@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_utf_16_is_named_with_the_command_that_converts_it(tmp_path, name, encoding, mark):
    text = '{"text": "One of them."}\n{"text": "\u4e00"}\n'
    file = _write(tmp_path / name, (mark + text).encode(encoding))
    wanted = "UTF-16" if mark else encoding
    with pytest.raises(DataError, match=rf"{name}:1: looks like UTF-16, not UTF-8; .* `iconv -f {wanted} -t UTF-8`"):
        _texts(file)
    faults: list[DataError] = []
    for chunk in read_chunks([file], max_documents=9, max_bytes=1 << 20):
        assert parse_chunk(chunk, ("text",), faults.append) == []
    assert len(faults) >= (2 if name == "a.jsonl" else 1)
    assert all("looks like UTF-16" in str(fault) for fault in faults[:2])
    _write(file, (mark + text).encode(encoding).decode(wanted).encode())  # as iconv does
    assert "One of them." in _texts(file)[0]


def test_utf_32_is_not_taken_for_utf_16(tmp_path):
    file = _write(tmp_path / "a.txt", "\ufeffone".encode("UTF-32LE"))
    with pytest.raises(DataError, match=r"a\.txt:1: looks like UTF-32, .* `iconv -f UTF-32 -t UTF-8`"):
        _texts(file)


def test_a_few_nuls_do_not_make_a_text_utf_16(tmp_path):
    text = "a\0b, and then \0\0 more"
    assert _texts(_write(tmp_path / "a.txt", text)) == [text]


def test_a_bad_byte_behind_a_mark_is_the_one_that_is_named(tmp_path):
    file = _write(tmp_path / "a.txt", b"\xef\xbb\xbfone\ntwo \xe9\n")
    with pytest.raises(DataError, match=r"a\.txt:2: byte 0xe9 is not UTF-8; .* `iconv -f latin1 -t UTF-8`"):
        _texts(file)


def test_several_keys_are_read_in_the_order_asked_for(tmp_path):
    file = _write(tmp_path / "a.jsonl", '{"a": "1", "b": "2", "c": "3"}')
    (chunk,) = read_chunks([file], max_documents=9, max_bytes=99)
    assert parse_chunk(chunk, ("c", "a")) == [(1, ("3", "1"))]


def test_bad_records_are_told_and_the_others_read_where_they_may_be_skipped(tmp_path):
    file = _write(tmp_path / "a.jsonl", '{"text": "1"}\n{\n{"text": "3"}\n{"txt": "4"}\n')
    (chunk,) = read_chunks([file], max_documents=9, max_bytes=999)
    told: list[DataError] = []
    assert parse_chunk(chunk, ("text",), told.append) == [(1, ("1",)), (3, ("3",))]
    assert [re.match(r".*a\.jsonl:(\d):", str(error))[1] for error in told] == ["2", "4"]
