from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.data.indexed import IndexedDataset
from megatron.errors import ConfigError, DataError, TokenizerError
from megatron.tokenizer import TokenizerConfig, build_tokenizer
from tiny_tokenizers import TEXT, write_huggingface, write_sentencepiece

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = [TEXT, "", "[formula]x[/formula]"]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "corpus.jsonl"


@pytest.fixture
def preprocess(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs the tool in this process and returns what it prints to both streams."""
    main = runpy.run_path(str(TOOL))["main"]

    def run(*arguments: object) -> tuple[str, str]:
        main([str(argument) for argument in arguments])
        return capsys.readouterr()

    return run


def test_the_command_of_the_original_works_with_either_spelling_of_its_flags(tmp_path, corpus, model_file, preprocess):
    flags = {
        "--input": corpus,
        "--output_prefix": tmp_path / "out",
        "--tokenizer_type": "SentencePieceTokenizer",
        "--vocab_file": model_file,
        "--vocab_extra_ids_list": "[formula],[/formula]",
        "--json_keys": "text",
        "--dataset_impl": "mmap",
        "--workers": 2,
        "--chunk_size": 32,
        "--log_interval": 1,
    }
    for underscores in (True, False):
        words = [w for flag, v in flags.items() for w in (flag if underscores else flag.replace("_", "-"), v)]
        out, err = preprocess(*words, "--append_eod" if underscores else "--append-eod")
        tokenizer = build_tokenizer(
            TokenizerConfig(vocab_file=str(model_file), vocab_extra_ids_list=("[formula],[/formula]",))
        )
        dataset = IndexedDataset(tmp_path / "out_text_document")
        expected = [[*tokenizer.encode(text), tokenizer.eod] for text in (TEXT, "[formula]x[/formula]")]
        assert [dataset.get(i).tolist() for i in range(len(dataset))] == expected

    num_tokens, longest = sum(map(len, expected)), max(map(len, expected))
    assert f"wrote {tmp_path}/out_text_document.bin and .idx" in out
    assert "tokenizer: SentencePieceTokenizer, 327 ids" in out
    assert "documents: 2, and 1 empty ones dropped" in out
    assert f"tokens:    {num_tokens}, at most {longest} in a document" in out
    assert all(word in err for word in ("100%", " MB/s", " documents, ", " tokens, ", "ETA"))


def test_bad_lines_are_shown_and_counted_where_they_may_be_skipped(tmp_path, model_file, preprocess):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + 30 * "{\n")
    usual = ("--input", tmp_path / "a.jsonl", "--output_prefix", tmp_path / "out", "--vocab_file", model_file)
    out, err = preprocess(*usual, "--on_error", "skip")
    assert "bad lines: 30 skipped" in out
    assert f"skipped: {tmp_path}/a.jsonl:2: not JSON" in err
    assert err.count("skipped: ") == 20 and "further bad lines are counted only" in err


def test_sentences_get_files_of_their_own_name(tmp_path, corpus, model_file, preprocess):
    usual = ("--input", corpus, "--output_prefix", tmp_path / "out", "--vocab_file", model_file)
    preprocess(*usual, "--split_sentences", "--keep_newlines")
    dataset = IndexedDataset(tmp_path / "out_text_sentence")
    assert len(dataset) > dataset.num_documents == 2


def test_an_interrupted_run_goes_on_with_resume(tmp_path, corpus, model_file, preprocess):
    usual = ("--input", corpus, "--output_prefix", tmp_path / "out", "--vocab_file", model_file)
    preprocess(*usual, "--resume")  # nothing to resume: a job script can always say it
    assert IndexedDataset(tmp_path / "out_text_document").num_documents == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "corpus.jsonl",
        "out_text_document.bin",
        "out_text_document.idx",
    ]


def test_an_interrupt_ends_it_without_a_traceback(tmp_path, corpus, model_file, monkeypatch):
    main = runpy.run_path(str(TOOL))["main"]

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(main.__globals__, "preprocess_files", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["--input", str(corpus), "--output_prefix", str(tmp_path / "out"), "--vocab_file", str(model_file)])
    assert ended.value.code == 130


@pytest.mark.parametrize("write", [write_sentencepiece, write_huggingface])
def test_nothing_that_starts_slowly_is_imported(tmp_path, corpus, write):
    model = write(tmp_path / "tokenizer")
    flags = ["--input", str(corpus), "--output_prefix", str(tmp_path / "out"), "--tokenizer_model", str(model)]
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({str(TOOL)!r})['main'](sys.argv[1:])\n"
        "print('imported:', sorted({'torch', 'transformers', 'awkward', 'pyarrow', 'zstandard'} & {*sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == "imported: []", result.stderr


def test_data_that_is_tokenized_already_is_written_as_it_is(tmp_path, preprocess):
    (tmp_path / "ids.jsonl").write_text('{"text": "3 1 2"}\n')
    preprocess("--input", tmp_path / "ids.jsonl", "--output_prefix", tmp_path / "out", "--vocab_size", 4)
    assert IndexedDataset(tmp_path / "out_text_document").get(0).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (("--apend_eod",), ConfigError, r"--apend_eod is not a flag of this program; did you mean --append_eod\?"),
        (("--keep-newlines",), ConfigError, "--keep_newlines is about the ends of sentences"),
        (("--lang", "german"), ConfigError, "--lang"),
        (("--dataset_impl", "lazy"), ConfigError, "--dataset_impl lazy is not written any more; drop the flag"),
        (("--json_keys", "text", "text"), ConfigError, "--json_keys text text names a key twice"),
        (("--log_interval", "0"), ConfigError, "--log_interval 0 is not a number of documents"),
        (("--workers", "0"), ConfigError, "--workers 0 cannot do any work"),
        (("--vocab_file", "none.model"), TokenizerError, "cannot read none.model"),
        (("--input", "none.jsonl"), DataError, "cannot read none.jsonl"),
        (("--input", "none*.jsonl"), ConfigError, r"--input none\*.jsonl matches no file"),
        (("--json_keys", "body"), DataError, "corpus.jsonl:1: no key 'body', the object has 'text'"),
        (("--output_prefix", "/dev/null/out"), DataError, "/dev/null/out_text_document: cannot be written"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(tmp_path, corpus, model_file, preprocess, flags, error, message):
    usual = ("--input", corpus, "--output_prefix", tmp_path / "out", "--vocab_file", model_file)
    with pytest.raises(error, match=message):
        preprocess(*usual, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_the_command_ends_an_error_in_one_line_with_status_2(tmp_path, corpus, model_file):
    with corpus.open("a") as file:
        file.write("{\n")
    flags = ["--input", str(corpus), "--output_prefix", str(tmp_path / "out"), "--vocab_file", str(model_file)]
    result = subprocess.run([sys.executable, str(TOOL), *flags], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith(f"DataError: {corpus}:4: not JSON")
    assert result.stderr.count("\n") == 1


def test_help_shows_the_default_key_as_it_is_typed(preprocess, capsys):
    with pytest.raises(SystemExit):
        preprocess("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "keys, or columns, that hold text; default: text --log_interval" in text
