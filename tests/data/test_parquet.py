from __future__ import annotations

import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron.data.documents import parse_chunk, read_chunks
from megatron.errors import ConfigError, DataError

TEXTS = [f"text {i} " + "é" * (i % 7) for i in range(100)]


def _write(path: Path, columns: dict[str, object], **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_every_row_is_a_document_whatever_the_groups_and_chunks(tmp_path, kind):
    file = _write(tmp_path / "a.parquet", {"id": range(100), "text": pyarrow.array(TEXTS, kind)}, row_group_size=30)
    for max_documents, max_bytes in [(1000, 1 << 20), (7, 1 << 20), (1000, 50)]:
        chunks = list(read_chunks([file], max_documents=max_documents, max_bytes=max_bytes))
        documents = [document for chunk in chunks for document in parse_chunk(chunk, ("text",))]
        assert documents == [(i + 1, (text,)) for i, text in enumerate(TEXTS)]
        assert chunks[-1].done_bytes == file.stat().st_size
        for i, chunk in enumerate(chunks):
            rest = list(read_chunks([file], max_documents=max_documents, max_bytes=max_bytes, start=chunk.end))
            assert [d for later in rest for d in parse_chunk(later, ("text",))] == [
                d for later in chunks[i + 1 :] for d in parse_chunk(later, ("text",))
            ]


def test_several_columns_are_read_in_the_order_asked_for(tmp_path):
    file = _write(tmp_path / "a.parquet", {"a": ["1"], "b": ["2"], "c": ["3"]})
    (chunk,) = read_chunks([file], max_documents=9, max_bytes=99, keys=("c", "a"))
    assert parse_chunk(chunk, ("c", "a")) == [(1, ("3", "1"))]


def test_a_row_without_text_is_named(tmp_path):
    file = _write(tmp_path / "a.parquet", {"text": ["a", None, "c"]})
    (chunk,) = read_chunks([file], max_documents=9, max_bytes=999)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: no text in UTF-8 under 'text'; remove the row"):
        parse_chunk(chunk, ("text",))


def test_a_row_that_is_not_utf8_is_named_and_costs_no_other_row(tmp_path):
    texts = pyarrow.array([b"a", b"\xff\xfe", b"\xc3\xa9"], pyarrow.binary()).view(pyarrow.string())
    file = _write(tmp_path / "a.parquet", {"text": texts})
    (chunk,) = read_chunks([file], max_documents=9, max_bytes=999)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: no text in UTF-8 under 'text'; remove the row"):
        parse_chunk(chunk, ("text",))
    bad: list[DataError] = []
    assert parse_chunk(chunk, ("text",), bad.append) == [(1, ("a",)), (3, ("é",))]
    assert [str(error).split(":")[0] for error in bad] == [f"{file}, row 2"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "id": [1]}, "no column 'text', the file has 'body', 'id'; name the columns .*--json_keys"),
        ({"text": [1]}, "column 'text' holds int64, not text"),
    ],
)
def test_columns_that_are_no_text_are_named(tmp_path, columns, message):
    with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
        list(read_chunks([_write(tmp_path / "a.parquet", columns)], max_documents=9, max_bytes=99))


def test_a_name_that_two_columns_have_is_no_answer_to_which_holds_text(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns 'text'; give each a name of its own"):
        list(read_chunks([tmp_path / "a.parquet"], max_documents=9, max_bytes=99))


@pytest.mark.parametrize("cut", [0, 100, -10])
def test_a_damaged_file_is_an_error(tmp_path, cut):
    file = _write(tmp_path / "a.parquet", {"text": TEXTS})
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet \(.*\); copy the file again"):
        list(read_chunks([file], max_documents=9, max_bytes=99))


def test_without_its_package_parquet_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    file = _write(tmp_path / "a.parquet", {"text": TEXTS})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"parquet needs the package pyarrow; run `pip install pyarrow`"):
        list(read_chunks([file], max_documents=9, max_bytes=99))
