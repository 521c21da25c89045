from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.data.preprocess import MAX_CHUNK_BYTES, map_in_order, preprocess_files, tokenize_file
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from tiny_tokenizers import TEXT, write_huggingface, write_sentencepiece

DOCUMENTS = [TEXT[start : start + 5 + 37 * start % 211] for start in range(0, 300, 2)]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_huggingface(tmp_path_factory.mktemp("huggingface"), eos_token="<|end|>"))


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface"])
def tokenizer(request, sentencepiece_file: str, huggingface_folder: str) -> Tokenizer:
    path = sentencepiece_file if request.param == "sentencepiece" else huggingface_folder
    return build_tokenizer(TokenizerConfig(tokenizer_model=path))


def _jsonl(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _text_jsonl(path: Path, texts: Sequence[str]) -> Path:
    return _jsonl(path, [{"text": text} for text in texts])


def _read(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.get(i).tolist() for i in range(len(dataset))]


def test_every_document_is_its_ids_in_the_order_of_the_input(tmp_path, tokenizer):
    inputs = [_text_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:90]), _text_jsonl(tmp_path / "b.jsonl", DOCUMENTS[90:])]
    result = preprocess_files(inputs, {"text": tmp_path / "out"}, tokenizer, workers=2, chunk_size=7)
    expected = [tokenizer.encode(text) for text in DOCUMENTS]
    assert _read(tmp_path / "out") == expected
    assert IndexedDataset(tmp_path / "out").num_documents == len(DOCUMENTS)
    assert (result.num_documents, result.num_dropped) == (len(DOCUMENTS), 0)
    assert result.num_tokens == sum(map(len, expected))
    assert result.longest_tokens == max(map(len, expected))
    assert result.num_bytes == result.total_bytes == sum(path.stat().st_size for path in inputs)


def test_the_files_are_the_same_bytes_for_any_number_of_workers_and_size_of_chunk(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    written = set()
    for workers, chunk_size in [(1, 256), (1, 1), (2, 3), (4, 1), (4, 256)]:
        preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, workers=workers, chunk_size=chunk_size)
        written.add(((tmp_path / "out.bin").read_bytes(), (tmp_path / "out.idx").read_bytes()))
    assert len(written) == 1


def test_append_eod_ends_every_document(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:5])
    preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, append_eod=True)
    assert _read(tmp_path / "out") == [[*tokenizer.encode(text), tokenizer.eod] for text in DOCUMENTS[:5]]


def test_the_dtype_is_chosen_from_the_whole_vocabulary(tmp_path):
    file = _text_jsonl(tmp_path / "a.jsonl", ["1 2"])
    for vocab_size, dtype in [(65_499, np.uint16), (65_500, np.int32)]:
        tokenizer = build_tokenizer(TokenizerConfig(vocab_size=vocab_size))
        preprocess_files([file], {"text": tmp_path / "out"}, tokenizer)
        assert IndexedDataset(tmp_path / "out").dtype == dtype


def test_documents_without_tokens_are_dropped_and_counted(tmp_path, huggingface_folder):
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=huggingface_folder))
    file = _text_jsonl(tmp_path / "a.jsonl", ["a", "", "b", ""])
    result = preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, append_eod=True)
    assert (result.num_documents, result.num_dropped) == (2, 2)
    assert _read(tmp_path / "out") == [[*tokenizer.encode(text), tokenizer.eod] for text in "ab"]


def test_a_text_of_blanks_that_has_no_tokens_is_dropped_too(tmp_path):
    file = _text_jsonl(tmp_path / "a.jsonl", ["1", "  ", "2"])
    result = preprocess_files([file], {"text": tmp_path / "out"}, build_tokenizer(TokenizerConfig(vocab_size=5)))
    assert (result.num_documents, result.num_dropped) == (2, 1)


def test_datasets_of_several_keys_stay_aligned(tmp_path, tokenizer):
    records = [{"q": "one", "a": "two"}, {"q": "three", "a": ""}, {"q": "", "a": "four"}, {"q": "five", "a": "six"}]
    file = _jsonl(tmp_path / "a.jsonl", records)
    result = preprocess_files([file], {"q": tmp_path / "q", "a": tmp_path / "a"}, tokenizer)
    assert (result.num_documents, result.num_dropped) == (2, 2)
    assert _read(tmp_path / "q") == [tokenizer.encode("one"), tokenizer.encode("five")]
    assert _read(tmp_path / "a") == [tokenizer.encode("two"), tokenizer.encode("six")]


def test_one_text_file_becomes_a_dataset_of_documents_that_end_with_eod(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n")
    tokenize_file(tmp_path / "a.txt", tmp_path / "cached", tokenizer)
    assert _read(tmp_path / "cached") == [[*tokenizer.encode(text), tokenizer.eod] for text in ("one", "two")]


def test_a_text_file_of_ids_has_no_eod_to_end_with(tmp_path):
    (tmp_path / "a.txt").write_text("1 2")
    tokenize_file(tmp_path / "a.txt", tmp_path / "cached", build_tokenizer(TokenizerConfig(vocab_size=5)))
    assert _read(tmp_path / "cached") == [[1, 2]]


def test_progress_grows_to_all_of_the_input(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    reports = []
    result = preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, chunk_size=10, report=reports.append)
    assert len(reports) == 15
    assert [r.num_documents for r in reports] == list(range(10, 151, 10))
    assert reports[-1] == result


def test_a_long_document_fills_a_chunk_alone(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", ["x " * MAX_CHUNK_BYTES, "a", "b"])
    reports = []
    preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, report=reports.append)
    assert [r.num_documents for r in reports] == [1, 3]


def test_an_error_names_the_first_bad_line_and_leaves_what_was_there_before(tmp_path, tokenizer):
    good = _text_jsonl(tmp_path / "good.jsonl", DOCUMENTS)
    preprocess_files([good], {"text": tmp_path / "out"}, tokenizer)
    before = (tmp_path / "out.bin").read_bytes()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good.read_text() + "{broken\n" + good.read_text() + "{broken\n")
    for workers in (1, 4):
        with pytest.raises(DataError, match=rf"bad\.jsonl:{len(DOCUMENTS) + 1}: not JSON"):
            preprocess_files([bad], {"text": tmp_path / "out"}, tokenizer, workers=workers, chunk_size=4)
    assert (tmp_path / "out.bin").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"good.jsonl", "bad.jsonl", "out.bin", "out.idx"}


def test_an_error_leaves_nothing_that_looks_finished(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "a"}\n')
    with pytest.raises(DataError, match="no key 'text'"):
        preprocess_files([tmp_path / "bad.jsonl"], {"text": tmp_path / "out"}, tokenizer, chunk_size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    class FullDisk:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self._file, name)

    class WriterOnFullDisk(IndexedDatasetWriter):
        def __init__(self, prefix, dtype):
            super().__init__(prefix, dtype)
            self._bin = FullDisk(self._bin)

    monkeypatch.setattr("megatron.data.preprocess.IndexedDatasetWriter", WriterOnFullDisk)
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"out: cannot be written \(No space left on device\)"):
        preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, workers=2, chunk_size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_ids_that_the_null_tokenizer_refuses_are_placed(tmp_path):
    file = _text_jsonl(tmp_path / "a.jsonl", ["1", "2 9", "3"])
    with pytest.raises(DataError, match=r"a\.jsonl, lines 1 to 3: id 9 is outside --vocab_size 5"):
        preprocess_files([file], {"text": tmp_path / "out"}, build_tokenizer(TokenizerConfig(vocab_size=5)))


@pytest.mark.parametrize(("content", "dropped"), [("", 0), ("\n\n", 0), ('{"text": ""}\n', 1)])
def test_input_without_text_is_an_error(tmp_path, tokenizer, content, dropped):
    (tmp_path / "a.jsonl").write_text(content)
    message = rf"a\.jsonl: no text to tokenize \({dropped} empty documents, {len(content)} bytes\)"
    with pytest.raises(DataError, match=message):
        preprocess_files([tmp_path / "a.jsonl"], {"text": tmp_path / "out"}, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers 0 cannot do any work; give 1 or more"),
        ({"chunk_size": 0}, "--chunk_size 0 is not a number of documents; give 1 or more"),
        ({"append_eod": True}, "--append_eod: the NullTokenizer has no end-of-document token; drop the flag"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(tmp_path, options, message):
    file = _text_jsonl(tmp_path / "a.jsonl", ["1"])
    with pytest.raises(ConfigError, match=message):
        preprocess_files([file], {"text": tmp_path / "out"}, build_tokenizer(TokenizerConfig(vocab_size=5)), **options)


def test_plain_text_has_no_keys(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"--json_keys q a: .*a\.txt is plain text and has no keys; give one key"):
        preprocess_files([tmp_path / "a.txt"], {"q": tmp_path / "q", "a": tmp_path / "a"}, tokenizer)


def test_map_in_order_looks_ahead_no_further_than_its_bound():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = map_in_order(lambda i: i * i, items(), workers=2)
    assert next(results) == 0
    assert len(taken) == 8  # four for every worker
    assert list(results) == [i * i for i in range(1, 100)]


def test_map_in_order_starts_nothing_more_once_it_has_failed():
    started = []

    def work(i):
        started.append(i)
        raise ValueError(f"item {i}")

    with pytest.raises(ValueError, match="item 0"):
        next(map_in_order(work, iter(range(100)), workers=1))
    assert len(started) <= 4  # those that were ahead already
