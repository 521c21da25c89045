"""Runs that are interrupted, and what the next one makes of it."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron.data import unfinished
from megatron.data.encoding import EncodedTexts
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import Listeners, Progress, preprocess_files
from megatron.data.preprocess_config import PreprocessConfig
from megatron.data.unfinished import UnfinishedDatasets
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from tiny_tokenizers import TEXT, write_sentencepiece

TEXTS = [TEXT[start : start + 5 + 37 * start % 211] for start in range(0, 300, 2)]
CONFIG = PreprocessConfig(append_eod=True, workers=2, chunk_size=4)
RESUME = replace(CONFIG, resume=True)


class Interruption(Exception):
    pass


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture
def tokenizer(model_file: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_model=str(model_file)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text, "title": text[:9]}) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    return tmp_path / "a.jsonl"


def _inputs(corpus: Path) -> list[Path]:
    """The corpus in every form, each several chunks long."""
    packed = corpus.with_name("b.jsonl.zst")
    packed.write_bytes(zstandard.compress(corpus.read_bytes()))
    plain = corpus.with_name("c.txt")
    plain.write_text("\n\n\n".join(text.strip() + " x" for text in TEXTS))
    rows = corpus.with_name("d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "title": [t[:9] for t in TEXTS]}), rows)
    return [corpus, packed, plain, rows]


def _interrupt_after(num_documents: int) -> Callable[[Progress], None]:
    def listen(progress: Progress) -> None:
        if progress.num_documents >= num_documents:
            raise Interruption

    return listen


def _outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".bin", ".idx")}


def test_a_run_continued_after_any_interruption_writes_the_same_bytes(tmp_path, corpus, tokenizer):
    inputs = _inputs(corpus)
    whole = preprocess_files(inputs, {"text": tmp_path / "whole" / "out"}, tokenizer, CONFIG)
    prefixes = {"text": tmp_path / "parts" / "out"}
    reports: list[Progress] = []
    for stop in (30, 150, 152, 290, 400, 500, 580):
        listen = Listeners(progress=_interrupt_after(stop))
        with pytest.raises(Interruption):
            preprocess_files(inputs, prefixes, tokenizer, RESUME, tell=listen, journal_interval_s=0.0)
        assert _outputs(tmp_path / "parts") == {}
    result = preprocess_files(inputs, prefixes, tokenizer, RESUME, tell=Listeners(progress=reports.append))
    # From where the last journal was on disk: how far that is behind the interruption is the disk's affair.
    assert reports[0].num_documents > 0
    assert result == whole
    assert _outputs(tmp_path / "parts") == _outputs(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["out.bin", "out.idx"]


def test_datasets_of_several_keys_are_continued_together(tmp_path, corpus, tokenizer):
    config = replace(RESUME, split_sentences=True)
    for folder, stops in (("whole", ()), ("parts", (40, 100))):
        prefixes = {key: tmp_path / folder / key / "out" for key in ("text", "title")}
        for stop in stops:
            with pytest.raises(Interruption):
                preprocess_files(
                    [corpus], prefixes, tokenizer, config,
                    tell=Listeners(progress=_interrupt_after(stop)), journal_interval_s=0.0,
                )  # fmt: skip
        preprocess_files([corpus], prefixes, tokenizer, config)
    assert _outputs(tmp_path / "parts") == _outputs(tmp_path / "whole")


def test_a_killed_process_leaves_nothing_that_looks_finished_and_is_continued(tmp_path, corpus, model_file, tokenizer):
    code = f"""
import os, pathlib, signal, time
from megatron.data.preprocess import Listeners, preprocess_files
from megatron.data.preprocess_config import PreprocessConfig
from megatron.tokenizer import TokenizerConfig, build_tokenizer
def listen(progress):
    if progress.num_documents > 40:
        while not pathlib.Path({str(tmp_path)!r}, "out.unfinished", "journal.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
preprocess_files([pathlib.Path({str(corpus)!r})], {{"text": pathlib.Path({str(tmp_path)!r}, "out")}},
    build_tokenizer(TokenizerConfig(tokenizer_model={str(model_file)!r})),
    PreprocessConfig(append_eod=True, workers=2, chunk_size=4), tell=Listeners(progress=listen), journal_interval_s=0.0)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert _outputs(tmp_path) == {}
    reports: list[Progress] = []
    preprocess_files([corpus], {"text": tmp_path / "out"}, tokenizer, RESUME, tell=Listeners(progress=reports.append))
    assert reports[0].num_documents > 0
    preprocess_files([corpus], {"text": tmp_path / "whole"}, tokenizer, CONFIG)
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert (tmp_path / "out.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


@pytest.fixture
def interrupted(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> Path:
    """The folder of an interrupted run on `corpus`."""
    listen = Listeners(progress=_interrupt_after(40))
    with pytest.raises(Interruption):
        preprocess_files([corpus], {"text": tmp_path / "out"}, tokenizer, CONFIG, tell=listen, journal_interval_s=0.0)
    assert f"{tmp_path}/out.unfinished: what is done is kept; the same command with --resume goes on" in caplog.text
    return tmp_path / "out.unfinished"


def test_work_is_not_thrown_away_without_a_word(tmp_path, corpus, tokenizer, interrupted):
    with pytest.raises(ConfigError, match=r"out\.unfinished: an interrupted run; continue it with --resume, or remove"):
        preprocess_files([corpus], {"text": tmp_path / "out"}, tokenizer, CONFIG)
    assert (interrupted / "journal.json").exists()


def test_a_run_of_another_request_is_not_continued(tmp_path, corpus, model_file, tokenizer, interrupted):
    prefixes = {"text": tmp_path / "out"}
    other = build_tokenizer(TokenizerConfig(tokenizer_model=str(model_file), vocab_extra_ids=1))
    again = "is not what it was when the run in .*; give the same command and files, or remove .*unfinished to start"
    for config, tokenizer_now, name in (
        (replace(RESUME, append_eod=False), tokenizer, "--append_eod"),
        (replace(RESUME, prepend_bos=True), tokenizer, "--prepend_bos"),
        (replace(RESUME, split_sentences=True), tokenizer, "--split_sentences"),
        (RESUME, other, "the tokenizer"),
    ):
        with pytest.raises(ConfigError, match=f"--resume: {name} {again}"):
            preprocess_files([corpus], prefixes, tokenizer_now, config)
    corpus.write_text(corpus.read_text() + '{"text": "more"}\n')
    with pytest.raises(ConfigError, match=f"--resume: --input {again}"):
        preprocess_files([corpus], prefixes, tokenizer, RESUME)


def test_other_threads_and_chunks_and_what_is_done_about_bad_lines_may_change(tmp_path, corpus, tokenizer, interrupted):
    config = PreprocessConfig(append_eod=True, resume=True, workers=1, chunk_size=99, on_error="skip")
    preprocess_files([corpus], {"text": tmp_path / "out"}, tokenizer, config)
    preprocess_files([corpus], {"text": tmp_path / "whole"}, tokenizer, CONFIG)
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


@pytest.mark.parametrize("content", ["", "{}", '{"version": 99}'])
def test_a_journal_that_cannot_be_read_is_an_error(tmp_path, corpus, tokenizer, interrupted, content):
    (interrupted / "journal.json").write_text(content)
    with pytest.raises(DataError, match=r"journal\.json: cannot be read \(.*\); remove .*out\.unfinished to start"):
        preprocess_files([corpus], {"text": tmp_path / "out"}, tokenizer, RESUME)


@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(b""), Path.unlink])
def test_files_shorter_than_the_journal_says_are_an_error(tmp_path, corpus, tokenizer, interrupted, spoil):
    spoil(interrupted / "tokens")
    with pytest.raises(DataError, match=r"tokens: 0 bytes, but the journal beside it speaks of \d+; remove"):
        preprocess_files([corpus], {"text": tmp_path / "out"}, tokenizer, RESUME)


def test_two_runs_do_not_write_one_dataset(tmp_path, corpus, tokenizer):
    def start_another(progress: Progress) -> None:
        preprocess_files([corpus], {"text": tmp_path / "out"}, tokenizer, CONFIG)

    with pytest.raises(DataError, match="out: another process is writing this dataset; wait for it"):
        preprocess_files(
            [corpus], {"text": tmp_path / "out"}, tokenizer, CONFIG, tell=Listeners(progress=start_another)
        )


def test_a_run_beside_one_with_a_journal_is_told_to_wait_and_not_to_remove_it(tmp_path, corpus, tokenizer):
    with _unfinished(tmp_path / "out", journal_interval_s=0.0) as running:
        running.open(None)
        running.append([_documents(1)], dict)
        running._wait()
        assert (running.folders[0] / "journal.json").exists()
        for config in (CONFIG, RESUME):
            with pytest.raises(DataError, match="another process is writing this dataset; wait for it"):
                preprocess_files([corpus], {"text": tmp_path / "out"}, tokenizer, config)


def _documents(value: int, count: int = 10) -> EncodedTexts:
    return EncodedTexts(np.full(count * 4, value, np.uint16), np.full(count, 4, np.int32), np.ones(count, np.int32))


def test_a_run_is_refused_where_any_of_its_datasets_is_being_written(tmp_path):
    """Whichever comes first among them, and without a trace of the refused one."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    with _unfinished(two, three) as running:
        running.open(None)
        running.append([_documents(1), _documents(1)], dict)
        for prefixes in ((three,), (one, three), (two, one), (three, two)):
            with (
                pytest.raises(DataError, match=r"/(two|three): another process is writing this dataset"),
                _unfinished(*prefixes) as refused,
            ):
                refused.open(None)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["three.unfinished", "two.unfinished"]
        with _unfinished(one) as other:  # the refused ones hold no lock
            other.open(None)
            other.append([_documents(2)], dict)
            other.finish()
        running.finish()
    for prefix, value in ((one, 2), (two, 1), (three, 1)):
        assert IndexedDataset(prefix).tokens.tolist() == [value] * 40


def _unfinished(*prefixes: Path, journal_interval_s: float = float("inf")) -> UnfinishedDatasets:
    return UnfinishedDatasets(
        prefixes, [np.dtype(np.uint16)] * len(prefixes), {}, journal_interval_s=journal_interval_s
    )


def test_a_disk_that_fills_up_late_keeps_what_the_journal_says(tmp_path, corpus, tokenizer, monkeypatch):
    class Filling:
        def __init__(self, file):
            self._file, self._num_writes = file, 0

        def write(self, data):
            self._num_writes += 1
            if self._num_writes > 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

        def __getattr__(self, name):
            return getattr(self._file, name)

    real = unfinished._open_at
    prefixes = {"text": tmp_path / "out"}
    with monkeypatch.context() as patched:
        patched.setattr(unfinished, "_open_at", lambda path, at: Filling(real(path, at)))
        with pytest.raises(DataError, match=r"out: cannot be written \(No space left on device\)"):
            preprocess_files([corpus], prefixes, tokenizer, CONFIG, journal_interval_s=0.0)
    preprocess_files([corpus], prefixes, tokenizer, RESUME)
    preprocess_files([corpus], {"text": tmp_path / "whole"}, tokenizer, CONFIG)
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


@pytest.mark.parametrize("journal_interval_s", [0.0, float("inf")])
def test_files_that_cannot_get_their_names_are_kept_and_the_error_says_where(tmp_path, journal_interval_s):
    one, two = tmp_path / "one", tmp_path / "two"
    for prefix in (one, two):
        _write(prefix, value=1)
    (tmp_path / "one.bin").unlink()
    (tmp_path / "one.bin").mkdir()  # as a file that this user may not replace
    with pytest.raises(DataError) as failed:
        _write(one, two, value=2, journal_interval_s=journal_interval_s)
    message = str(failed.value)
    assert message.startswith(f"{one}.bin: a finished file cannot get this name (")
    assert message.endswith(
        f"see to the cause and move, in this order, {one}.unfinished/tokens to {one}.bin, "
        f"{one}.unfinished/idx to {one}.idx; or run again."
    )
    assert IndexedDataset(two).tokens.tolist() == [2] * 40 and not (tmp_path / "one.idx").exists()
    (tmp_path / "one.bin").rmdir()
    for file, name in (("tokens", "bin"), ("idx", "idx")):
        shutil.copyfile(tmp_path / "one.unfinished" / file, tmp_path / f"one.{name}")
    assert IndexedDataset(one).tokens.tolist() == [2] * 40
    _write(one, two, value=3)  # is not held up by what was kept
    assert IndexedDataset(one).tokens.tolist() == IndexedDataset(two).tokens.tolist() == [3] * 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.bin", "one.idx", "two.bin", "two.idx"]


def _write(*prefixes: Path, value: int, journal_interval_s: float = float("inf")) -> None:
    with _unfinished(*prefixes, journal_interval_s=journal_interval_s) as datasets:
        datasets.open(datasets.read_journal())
        datasets.append([_documents(value)] * len(prefixes), dict)
        datasets.finish()
