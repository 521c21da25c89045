"""What is shown of a run's samples is what its model will see."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoint_samples import INFO, save_from_one_process
from megatron.checkpoint.source import TokenizerIdentity
from megatron.core.layout import ParallelLayout
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.pieces import Piece
from megatron.data.sample import PairSample, Sample
from megatron.data.show import SampleText
from megatron.errors import CheckpointError, ConfigError
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.config import TokenizerConfig
from tiny_tokenizers import TEXT, write_huggingface, write_sentencepiece, write_wordpiece
from tools.preprocess_instruct_data import main as preprocess
from tools.show_dataset import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_huggingface(folder / "hf", eos_token="<|end|>")
    write_sentencepiece(folder)
    return folder


@pytest.fixture(scope="module", params=["hf", "tokenizer.model"])
def tokenizer(folder: Path, request: pytest.FixtureRequest) -> Tokenizer:
    kind = "SentencePieceTokenizer" if request.param == "tokenizer.model" else "HuggingFaceTokenizer"
    return build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(folder / request.param)))


def write(prefix: Path, tokenizer: Tokenizer, texts: list[str]) -> Path:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for text in texts:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod])
    return prefix


def flags(tokenizer: Tokenizer, folder: Path, prefix: Path, *more: str) -> list[str]:
    model = folder / "hf" if tokenizer.identity.type == "HuggingFaceTokenizer" else folder / "tokenizer.model"
    return [
        *f"--tokenizer_type {tokenizer.identity.type} --tokenizer_model {model} --data_path {prefix}".split(),
        *"--split 1,0,0 --eval_iters 0 --seq_length 40 --no_color".split(),
        *more,
    ]


def test_all_of_the_text_is_shown_once_and_in_order(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(TEXT), tokenizer.eod, *tokenizer.encode(TEXT[:100])]
    sample = Sample(np.array(ids), np.ones(len(ids) - 1, np.float32))
    shown = SampleText(tokenizer, marks=False).render(sample, [Piece(0, 7, 0)]).plain
    end = shown.index(TEXT) + len(TEXT)
    assert shown[:end] == f"── document 7\n{TEXT}"
    assert TEXT[:100] in shown[end:] and len(shown) - end < 100 + 20  # between them the name of the end


def test_what_does_not_count_is_marked_and_weights_are_told(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("It is a truth universally acknowledged.")
    mask = np.ones(len(ids) - 1, np.float32)
    mask[: len(ids) // 2 - 1], mask[-1] = 0.0, 0.25
    sample = Sample(np.array(ids), mask)
    shown = SampleText(tokenizer, marks=True).render(sample, [Piece(0, 0, 3)]).plain
    assert shown.startswith("── document 0 from token 3\n‹It is")
    assert shown.count("‹") == shown.count("›") == 2 and "‹0.25: " in shown
    counted = shown.partition("›")[2].partition("‹")[0]
    assert counted.strip() == tokenizer.decode(ids[len(ids) // 2 : -1]).strip()
    plain = SampleText(tokenizer, marks=False).render(sample, [Piece(0, 0, 3)])
    assert "‹" not in plain.plain and any("dim" in str(span.style) for span in plain.spans)


def test_special_tokens_stand_out_by_name(tokenizer: Tokenizer) -> None:
    assert tokenizer.eod is not None
    sample = Sample(np.array([*tokenizer.encode("a wife"), tokenizer.eod]), np.ones(len(tokenizer.encode("a wife"))))
    text = SampleText(tokenizer, marks=False).render(sample, [Piece(0, 0, 0)])
    name = "<|end|>" if tokenizer.identity.type == "HuggingFaceTokenizer" else "<EOD>"
    assert [text.plain[span.start : span.end] for span in text.spans if "reverse" in str(span.style)] == [name]


def test_documents_begin_on_their_own_line_with_their_number(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"the man number {number} had not" for number in range(12)]
    prefix = write(tmp_path / "data", tokenizer, texts)
    main(flags(tokenizer, folder, prefix, "--start", "1", "--num_samples", "2"))
    shown = capsys.readouterr().out
    headers = [line for line in shown.splitlines() if line.startswith("sample ")]
    assert len(headers) == 2
    assert headers[0].startswith(f"sample 1 · {prefix} · document") and headers[0].endswith("40 inputs, 40 count")
    for part in shown.split("── document ")[1:]:
        number, text = part.split("\n", 1)
        if "from token" not in number and "sample" not in text and f"{number} had not" not in text:
            assert part is shown.split("── document ")[-1] or text.strip("‹›\n") in texts[int(number)]


def test_a_blend_names_the_dataset_of_each_sample_and_a_part_can_be_chosen(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefixes = [write(tmp_path / name, tokenizer, [TEXT] * 4) for name in ("web", "code")]
    argv = flags(tokenizer, folder, prefixes[0])
    at = argv.index("--data_path")
    argv[at : at + 2] = ["--train_data_path", "1", str(prefixes[0]), "1", str(prefixes[1])]
    argv[argv.index("--eval_iters") + 1] = "1"
    argv += ["--valid_data_path", f"web={prefixes[0]}", "--num_samples", "4"]
    main(argv)
    headers = [line.split(" · ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("sample ")]
    assert sorted(headers) == sorted(2 * [str(prefixes[0]), str(prefixes[1])])
    main([*argv, "--part", "validation_web"])
    assert f"sample 0 · {prefixes[0]} ·" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--part other is not a part of this data; use train, validation_web."):
        main([*argv, "--part", "other"])


def test_wrong_numbers_are_told(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(tokenizer, folder, write(tmp_path / "data", tokenizer, ["a man"] * 20))
    with pytest.raises(ConfigError, match=r"--start -1 --num_samples 3: nothing to show; count samples from 0"):
        main([*argv, "--start", "-1"])
    with pytest.raises(ConfigError, match=r"--start 999999: there are \d+ samples, counted from 0; give a lower"):
        main([*argv, "--start", "999999", "--train_iters", "2"])


def test_the_flags_of_a_run_are_taken_as_they_are(
    tokenizer: Tokenizer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(tokenizer, folder, write(tmp_path / "data", tokenizer, ["a man"] * 20))
    argv += "--num_layers 4 --hidden_size 64 --num_attention_heads 4 --tensor_model_parallel_size 2".split()
    argv += "--micro_batch_size 2 --global_batch_size 8 --train_iters 10 --lr 1e-3 --bf16 --eod_mask_loss".split()
    main([*argv, "--num_samples", "1"])
    assert "‹" in capsys.readouterr().out  # what follows the end of a document


def test_another_tokenizer_in_the_place_of_a_checkpoints_is_an_error_and_one_that_is_named_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sentencepiece(tmp_path)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_model=str(file)))
    run = tmp_path / "run"
    info = replace(
        INFO,
        state=replace(INFO.state, config={"tokenizer": {"tokenizer_model": str(file)}}),
        model=replace(INFO.model, vocab_size=tokenizer.vocab_size),
        tokenizer=TokenizerIdentity(tokenizer.name, str(file), tokenizer.identity.file_sha256),
    )
    save_from_one_process(run, ParallelLayout(), info=info)
    argv = (
        f"--load {run} --use_checkpoint_args --data_path {write(tmp_path / 'data', tokenizer, ['a man'] * 20)}".split()
    )
    argv += "--split 1,0,0 --eval_iters 0 --seq_length 40 --num_samples 1 --no_color".split()
    main(argv)
    file.write_bytes(file.read_bytes().replace(b"ed", b"eD", 1))
    with pytest.raises(CheckpointError, match=rf"{file} is not the tokenizer of .*iter_0000010: its SHA-256 is"):
        main(argv)
    assert warnings(caplog) == []
    main([*argv, "--tokenizer_model", str(file)])
    assert warnings(caplog) == [f"{file} is not the tokenizer of {run / 'iter_0000010'}"]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What they are about: all before the first colon."""
    return [r.getMessage().partition(":")[0] for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("more", [[], ["--packing"]])
def test_conversations_show_whose_words_count(
    more: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"question": f"who is number {i}?", "answer": f"a single man {i}"} for i in range(6)]
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tokenizer = ["--tokenizer_model", str(folder / "hf"), "--vocab_extra_ids_list", "<|im_start|>,<|im_end|>"]
    argv = [*tokenizer, "--input", str(tmp_path / "chats.jsonl"), "--output_prefix", str(tmp_path / "chats")]
    preprocess([*argv, "--question_key", "question", "--answer_key", "answer"])
    capsys.readouterr()
    argv = [*tokenizer, "--data_type", "instruction", "--data_path", str(tmp_path / "chats"), *more]
    main([*argv, *"--split 1,0,0 --eval_iters 0 --seq_length 256 --no_color --num_samples 1".split()])
    shown = capsys.readouterr().out
    documents = shown.split("── document ")[1:]
    assert len(documents) > 1 if more else len(documents) == 1
    for document in documents:
        number, text = document.split("\n", 1)
        counted = re.sub("‹.*?›", "", text, flags=re.DOTALL)
        assert f"who is number {number}?" in text and "who is" not in counted
        assert f"a single man {number}" in counted


def test_roles_have_colours(tokenizer: Tokenizer) -> None:
    ids, roles = tokenizer.encode("a man, a wife"), np.array([0, 1, 2])
    sample = Sample(np.array(ids[:3]), np.ones(2, np.float32))
    styles = [
        str(span.style) for span in SampleText(tokenizer, marks=False).render(sample, [Piece(0, 0, 0)], roles).spans
    ]
    assert [style.split()[0] for style in styles[1:]] == ["magenta", "cyan", "green"]


@pytest.fixture(params=["wordpiece", "sentencepiece"])
def masked(folder: Path, request: pytest.FixtureRequest) -> list[str]:
    """The flags of a tokenizer with the tokens that pairs of texts need."""
    if request.param == "sentencepiece":
        return ["--tokenizer_model", str(folder / "tokenizer.model")]
    return ["--tokenizer_type", "BertWordPieceCase", "--vocab_file", str(write_wordpiece(folder, folder))]


def tokenizer_of(flags: list[str]) -> Tokenizer:
    names = [flag.removeprefix("--") for flag in flags[::2]]
    return build_tokenizer(TokenizerConfig(**dict(zip(names, flags[1::2], strict=True))))


def test_a_pair_shows_both_texts_and_what_each_hidden_token_was(masked: list[str]) -> None:
    tokenizer = tokenizer_of(masked)
    first, second = tokenizer.encode("It is a truth universally acknowledged,"), tokenizer.encode("that a single man")
    labels = np.array([tokenizer.cls, *first, tokenizer.sep, *second, tokenizer.sep, *5 * [tokenizer.pad]])
    begins_second, length = len(first) + 2, len(labels) - 5
    hidden, replaced, kept = 1, 4, begins_second + 1
    tokens, counts, position = labels.copy(), np.zeros(len(labels), np.float32), np.arange(len(labels))
    tokens[[hidden, replaced]] = tokenizer.mask, second[0]
    counts[[hidden, replaced, kept]] = 1
    types = ((position >= begins_second) & (position < length)).astype(np.int64)
    padding = (position >= length).astype(np.int32)
    text = SampleText(tokenizer, marks=True).render_pair(PairSample(tokens, labels, counts, types, padding, False))
    lines = text.plain.splitlines()
    assert [lines[i] for i in (0, 2, 4)] == [
        "── first text, type 0",
        "── second text, type 1",
        "── padding, 5 tokens",
    ]
    cls, sep, mask = (tokenizer.decode([token]) for token in (tokenizer.cls, tokenizer.sep, tokenizer.mask))
    pairs = re.findall(r"{(.*?)→(.*?)}", text.plain)
    assert pairs[0][0] == mask and pairs[0][1].strip() == tokenizer.decode(labels[[hidden]]).strip()
    assert pairs[1][0].strip() == tokenizer.decode([second[0]]).strip() and pairs[1][0] != pairs[1][1]
    assert pairs[2][0] == pairs[2][1] and len(pairs) == 3
    as_it_was = [re.sub(r"{.*?→(.*?)}", r"\1", line) for line in lines]
    assert as_it_was[1] == f"{cls}{tokenizer.decode(first)}{sep}" and as_it_was[3] == f"{tokenizer.decode(second)}{sep}"
    special = {text.plain[span.start : span.end] for span in text.spans if "reverse" in str(span.style)}
    assert special == {cls, sep, mask}


def test_pairs_tell_whether_the_second_text_follows(
    masked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_of(masked)
    with IndexedDatasetWriter(tmp_path / "pairs", "uint16") as writer:
        for word in ("a man", "a wife", "a truth", "a fortune"):
            sentences = [tokenizer.encode(word)] * 4
            writer.add_document(np.concatenate(sentences), lengths=[len(sentence) for sentence in sentences])
    argv = ["--model_name", "bert", *masked, *"--seq_length 40 --no_color --num_samples 8".split()]
    argv += ["--train_data_path", "0.5", str(tmp_path / "pairs"), "0.5", str(tmp_path / "pairs")]
    main(argv)
    samples = capsys.readouterr().out.split("sample ")[1:]
    assert len(samples) == 8
    found = set()
    for sample in samples:
        headline, _, text = sample.partition("\n")
        _, name, origin, counts = headline.split(" · ")
        assert name == str(tmp_path / "pairs") and counts == f"40 inputs, {text.count('→')} count"
        words = [
            {word for word in ("man", "wife", "truth", "fortune") if word in re.sub(r"{.*?→(.*?)}", r"\1", part)}
            for part in text.split("── ")[1:3]
        ]
        assert origin == f"the second text {'follows the first' if words[0] == words[1] else 'is from elsewhere'}"
        found.add(origin)
    assert len(found) == 2
