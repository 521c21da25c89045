from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron.data import unfinished
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.inputs import find_inputs
from megatron.data.preprocess import Listeners, Progress, preprocess_files, tokenize_file
from megatron.data.preprocess_config import PreprocessConfig
from megatron.errors import ConfigError, DataError, TokenizerError
from megatron.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from megatron.tokenizer.gigatoken import FastTokenizerMismatch, GigatokenEncoder
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
    result = preprocess_files(inputs, {"text": tmp_path / "out"}, tokenizer, PreprocessConfig(workers=2, chunk_size=7))
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
        config = PreprocessConfig(workers=workers, chunk_size=chunk_size)
        preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, config)
        written.add(((tmp_path / "out.bin").read_bytes(), (tmp_path / "out.idx").read_bytes()))
    assert len(written) == 1


def test_append_eod_ends_every_document(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:5])
    preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, PreprocessConfig(append_eod=True))
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
    result = preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, PreprocessConfig(append_eod=True))
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


def test_progress_grows_from_nothing_to_all_of_the_input(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    reports: list[Progress] = []
    config = PreprocessConfig(chunk_size=10)
    result = preprocess_files(
        [file], {"text": tmp_path / "out"}, tokenizer, config, tell=Listeners(progress=reports.append)
    )
    assert [r.num_documents for r in reports] == list(range(0, 151, 10))
    assert reports[-1] == result


def test_an_error_names_the_first_bad_line_and_leaves_what_was_there_before(tmp_path, tokenizer):
    good = _text_jsonl(tmp_path / "good.jsonl", DOCUMENTS)
    preprocess_files([good], {"text": tmp_path / "out"}, tokenizer)
    before = (tmp_path / "out.bin").read_bytes()
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good.read_text() + "{broken\n" + good.read_text() + "{broken\n")
    for workers in (1, 4):
        with pytest.raises(DataError, match=rf"bad\.jsonl:{len(DOCUMENTS) + 1}: not JSON"):
            config = PreprocessConfig(workers=workers, chunk_size=4)
            preprocess_files([bad], {"text": tmp_path / "out"}, tokenizer, config)
    assert (tmp_path / "out.bin").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"good.jsonl", "bad.jsonl", "out.bin", "out.idx"}


def test_an_error_leaves_nothing_that_looks_finished(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "a"}\n')
    with pytest.raises(DataError, match="no key 'text'"):
        preprocess_files(
            [tmp_path / "bad.jsonl"], {"text": tmp_path / "out"}, tokenizer, PreprocessConfig(chunk_size=1)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


class FullDisk:
    """Takes `room` bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        self._room -= len(memoryview(data).cast("B"))
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(unfinished, "_open_at", lambda path, at, real=unfinished._open_at: FullDisk(real(path, at), 0))
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"out: cannot be written \(No space left on device\)"):
        preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, PreprocessConfig(workers=2, chunk_size=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_ids_that_the_null_tokenizer_refuses_are_placed(tmp_path):
    file = _text_jsonl(tmp_path / "a.jsonl", ["1", "2 9", "3", "x"])
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=5))
    with pytest.raises(DataError, match=r"a\.jsonl:2: id 9 is outside --vocab_size 5"):
        preprocess_files([file], {"text": tmp_path / "out"}, tokenizer)
    told: list[DataError] = []
    result = preprocess_files(
        [file],
        {"text": tmp_path / "out"},
        tokenizer,
        PreprocessConfig(on_error="skip"),
        tell=Listeners(bad=told.append),
    )
    assert [str(error).split(":")[1] for error in told] == ["2", "4"]
    assert (result.num_documents, result.num_dropped, result.num_bad) == (2, 0, 2)
    assert _read(tmp_path / "out") == [[1], [3]]


def test_bad_lines_can_be_skipped_and_are_told_in_order(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
    bad = {3: b"{", 70: b'{"txt": "a"}', 71: b'{"text": "\xff"}', 149: b"[]"}
    content = [bad.get(i, line) for i, line in enumerate(lines)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(content))
    told: list[DataError] = []
    config = PreprocessConfig(on_error="skip", workers=3, chunk_size=2)
    result = preprocess_files(
        [tmp_path / "a.jsonl"], {"text": tmp_path / "out"}, tokenizer, config, tell=Listeners(bad=told.append)
    )
    assert [int(str(error).split(":")[1]) - 1 for error in told] == list(bad)
    assert (result.num_documents, result.num_bad) == (len(DOCUMENTS) - 4, 4)
    assert _read(tmp_path / "out") == [tokenizer.encode(text) for i, text in enumerate(DOCUMENTS) if i not in bad]


@pytest.mark.parametrize(("content", "dropped"), [("", 0), ("\n\n", 0), ('{"text": ""}\n', 1)])
def test_input_without_text_is_an_error(tmp_path, tokenizer, content, dropped):
    (tmp_path / "a.jsonl").write_text(content)
    message = rf"a\.jsonl: no text to tokenize \({dropped} empty documents, 0 bad lines, {len(content)} bytes\)"
    with pytest.raises(DataError, match=message):
        preprocess_files([tmp_path / "a.jsonl"], {"text": tmp_path / "out"}, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers 0 cannot do any work; give 1 or more"),
        ({"chunk_size": 0}, "--chunk_size 0 is not a number of documents; give 1 or more"),
        ({"keep_newlines": True}, "--keep_newlines is about the ends of sentences; give --split_sentences too"),
        ({"append_eod": True}, "--append_eod: the NullTokenizer has no end-of-document token; drop the flag"),
        ({"prepend_bos": True}, "--prepend_bos: the NullTokenizer has no bos token; drop the flag"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(tmp_path, options, message):
    file = _text_jsonl(tmp_path / "a.jsonl", ["1"])
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=5))
    with pytest.raises(ConfigError, match=message):
        preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, PreprocessConfig(**options))


def test_plain_text_has_no_keys(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"--json_keys q a: .*a\.txt is plain text and has no keys; give one key"):
        preprocess_files([tmp_path / "a.txt"], {"q": tmp_path / "q", "a": tmp_path / "a"}, tokenizer)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_compressed_file_and_a_glob_give_the_datasets_of_the_plain_files(tmp_path, tokenizer, suffix, pack):
    plain = [_text_jsonl(tmp_path / f"{name}.jsonl", DOCUMENTS[start::2]) for start, name in enumerate("ab")]
    for path in plain:
        path.with_name(path.name + suffix).write_bytes(pack(path.read_bytes()))
    preprocess_files(plain, {"text": tmp_path / "plain"}, tokenizer)
    result = preprocess_files(find_inputs([f"{tmp_path}/*{suffix}"]), {"text": tmp_path / "packed"}, tokenizer)
    assert _bytes(tmp_path / "packed") == _bytes(tmp_path / "plain")
    assert result.num_text_bytes == sum(path.stat().st_size for path in plain)
    assert result.num_bytes == result.total_bytes < result.num_text_bytes


def test_bos_and_eod_frame_every_document(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", ["one", "", "two"])
    bos = tokenizer.bos if tokenizer.bos is not None else tokenizer.eod
    with_bos = _WithBos(tokenizer, bos)
    config = PreprocessConfig(prepend_bos=True, append_eod=True)
    preprocess_files([file], {"text": tmp_path / "out"}, with_bos, config)
    assert _read(tmp_path / "out") == [[bos, *tokenizer.encode(text), tokenizer.eod] for text in ("one", "two")]


class _WithBos:
    def __init__(self, tokenizer: Tokenizer, bos: int):
        self._tokenizer, self.bos = tokenizer, bos

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


class _Lying(_WithBos):
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.full(3, self.bos, dtype=np.int32) for _ in texts]


@pytest.mark.parametrize("wrong", [65_600, -1])
def test_an_id_outside_the_vocabulary_is_refused_and_not_made_another_one(tmp_path, tokenizer, wrong):
    file = _text_jsonl(tmp_path / "a.jsonl", ["a"])
    config = PreprocessConfig(tokenizer_backend="reference")
    with pytest.raises(TokenizerError, match=rf"the tokenizer gave id \d+, and has {tokenizer.vocab_size} ids"):
        preprocess_files([file], {"text": tmp_path / "out"}, _Lying(tokenizer, wrong), config)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_sentences_are_the_sequences_of_their_document(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", ["One. Two! Three", " ", "Dr. Bennet had not."])
    config = PreprocessConfig(split_sentences=True, append_eod=True)
    result = preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, config)
    one, two, three, four = map(tokenizer.encode, ("One.", "Two!", "Three", "Dr. Bennet had not."))
    assert _read(tmp_path / "out") == [one, two, [*three, tokenizer.eod], [*four, tokenizer.eod]]
    assert IndexedDataset(tmp_path / "out").document_indices.tolist() == [0, 3, 4]
    assert (result.num_documents, result.num_dropped) == (2, 1)
    assert result.longest_tokens == max(len(one) + len(two) + len(three), len(four)) + 1


def test_the_files_are_those_that_the_writer_of_datasets_writes(tmp_path, tokenizer):
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    preprocess_files([file], {"text": tmp_path / "out"}, tokenizer)
    with IndexedDatasetWriter(tmp_path / "expected", IndexedDataset(tmp_path / "out").dtype) as writer:
        for text in DOCUMENTS:
            writer.add_document(tokenizer.encode(text))
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "expected")


def _bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def _backend(config: PreprocessConfig, tmp_path: Path, tokenizer: Tokenizer, file: Path, name: str) -> str:
    used: list[str] = []
    preprocess_files([file], {"text": tmp_path / name}, tokenizer, config, tell=Listeners(backend=used.append))
    return used[-1]


def test_gigatoken_writes_the_bytes_of_the_tokenizer(tmp_path, tokenizer):
    pytest.importorskip("gigatoken")
    file = _text_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "</s> <|end|>", "x" * 100_000])
    config = PreprocessConfig(append_eod=True, workers=2, chunk_size=9)
    assert _backend(config, tmp_path, tokenizer, file, "auto") == "gigatoken"
    assert _backend(replace(config, tokenizer_backend="gigatoken"), tmp_path, tokenizer, file, "fast") == "gigatoken"
    assert _backend(replace(config, tokenizer_backend="reference"), tmp_path, tokenizer, file, "slow") == ""
    assert _bytes(tmp_path / "auto") == _bytes(tmp_path / "fast") == _bytes(tmp_path / "slow")


@pytest.mark.parametrize("journal_interval_s", [0.0, 1000.0])
def test_ids_that_differ_late_are_found_and_everything_is_tokenized_again(
    tmp_path, tokenizer, monkeypatch, caplog, journal_interval_s
):
    pytest.importorskip("gigatoken")
    file = _text_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    real = GigatokenEncoder.encode_batch
    calls = []

    def differs_in_the_fifth_batch(self, texts, seed):
        calls.append(seed)
        if len(calls) == 5:
            raise FastTokenizerMismatch("gigatoken's ids differ from the tokenizer's in 'some text'...")
        return [ids[::-1] for ids in real(self, texts, seed)]  # wrong, and not noticed at once

    monkeypatch.setattr(GigatokenEncoder, "encode_batch", differs_in_the_fifth_batch)
    config = PreprocessConfig(chunk_size=9, workers=1)
    prefixes = {"text": tmp_path / "out"}
    preprocess_files([file], prefixes, tokenizer, config, journal_interval_s=journal_interval_s)
    assert _read(tmp_path / "out") == [tokenizer.encode(text) for text in DOCUMENTS]
    assert "in 'some text'...; everything is tokenized again, by the tokenizer's own library" in caplog.text
    calls.clear()
    with pytest.raises(TokenizerError, match=r"in 'some text'...; use --tokenizer_backend auto"):
        demanded = replace(config, tokenizer_backend="gigatoken")
        preprocess_files([file], prefixes, tokenizer, demanded, journal_interval_s=journal_interval_s)
    assert not (tmp_path / "out.unfinished").exists()


def test_gigatoken_that_is_demanded_and_cannot_be_had_is_an_error(tmp_path):
    file = _text_jsonl(tmp_path / "a.jsonl", ["1"])
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=5))
    with pytest.raises(TokenizerError, match=r"--tokenizer_backend gigatoken: gigatoken .*; or use auto"):
        preprocess_files([file], {"text": tmp_path / "out"}, tokenizer, PreprocessConfig(tokenizer_backend="gigatoken"))
