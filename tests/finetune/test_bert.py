"""BERT from text to `transformers`, by the commands that users type."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForPreTraining

import verify_correctness
from finetune_runs import Ending, command, finetune_runs, finetune_succeeds, script_main
from megatron.checkpoint.opening import open_source
from megatron.data.epoch_blend import EpochBlend
from megatron.errors import DataError
from megatron.tokenizer.wordpiece import BertWordPieceLowerCase
from megatron.training.checkpointing import Progress
from megatron.training.datasets import build_datasets, describe_continuation
from megatron.training.sinks import METRICS_FILE, read_metrics
from reference import serial_stage
from small_run import small_run
from tiny_tokenizers import TEXT, write_wordpiece

SEQ_LENGTH, NUM_DOCUMENTS = 32, 40
# What --model_name bert stands for, and none of the architecture of the other small runs.
_NOT_BERT = (
    "num_attention_heads_kv use_rms_norm glu_activation position_embedding_type no_tie_embed_logits vocab_size "
    "tokenizer_type"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.txt, corpus.jsonl and corpus_text_sentence."""
    folder = tmp_path_factory.mktemp("bert")
    write_wordpiece(Path(), folder)
    sentences = [sentence + "." for sentence in TEXT.replace("\n", " ").split(". ")]
    words = TEXT.split()
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(NUM_DOCUMENTS):
            own = [" ".join(words[(7 * i + 5 * k) % 80 :][: 4 + k % 5]).capitalize() + "." for k in range(2 + i % 7)]
            file.write(json.dumps({"text": " ".join([sentences[i % len(sentences)], *own])}) + "\n")
    script_main("tools/preprocess_data.py")(
        [
            f"--input={folder / 'corpus.jsonl'}",
            f"--output_prefix={folder / 'corpus'}",
            "--split_sentences",
            "--tokenizer_type=BertWordPieceLowerCase",
            f"--vocab_file={folder / 'vocab.txt'}",
            "--workers=1",
        ]
    )
    return folder


def argv(folder: Path, save: Path, **flags: object) -> list[str]:
    bert = {
        **dict.fromkeys(_NOT_BERT, False),
        "model_name": "bert",
        "max_position_embeddings": SEQ_LENGTH,
        "seq_length": SEQ_LENGTH,
        "tokenizer_type": "BertWordPieceLowerCase",
        "vocab_file": folder / "vocab.txt",
        "hidden_dropout": 0,
        "attention_dropout": 0,
        "train_iters": 6,
        "save": save,
    }
    return command(folder / "corpus_text_sentence", **{**bert, **flags})


def figures(folder: Path) -> list[float | int | None]:
    names = ("lm_loss", "sentence_loss", "grad_norm", "validation_loss", "validation_sentence_loss")
    return [line[name] for line in read_metrics(folder / METRICS_FILE) for name in names if name in line]


@pytest.fixture(scope="module")
def serial(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("serial")
    (save / "log.txt").write_text(finetune_succeeds(1, argv(folder, save, log_interval=1))[0])
    return save


def test_both_losses_are_logged_and_fall(serial: Path):
    log = (serial / "log.txt").read_text()
    assert log.count("| sentence loss ") == 6 + 2 and "\nvalidation" not in log.split("iteration")[0]
    lines = read_metrics(serial / METRICS_FILE)
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    assert lines[0]["sentence_loss"] == pytest.approx(0.69, abs=0.2), "two classes, nothing learnt: log 2"
    assert {"validation_loss", "validation_sentence_loss"} <= lines[4].keys()


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": None, "micro_batch_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"zero_stage": 3, "micro_batch_size": 2, "num_workers": 0}),
    ],
)
def test_layouts_have_the_losses_of_one_process(folder, serial, tmp_path, world_size, flags):
    finetune_succeeds(world_size, argv(folder, tmp_path, log_interval=1, **flags))
    assert figures(tmp_path) == pytest.approx(figures(serial), rel=1e-5)


def test_a_stopped_run_goes_on_on_other_ranks_as_if_it_had_not_stopped(folder, serial, tmp_path):
    finetune_succeeds(1, argv(folder, tmp_path, log_interval=1, save_interval=3, exit_interval=3))
    finetune_succeeds(2, argv(folder, tmp_path, log_interval=1, load=tmp_path, micro_batch_size=2))
    assert figures(tmp_path) == pytest.approx(figures(serial), rel=1e-5)


def test_transformers_computes_the_same_with_what_is_exported(folder, serial, tmp_path, capsys):
    script_main("weights_conversion/megatron_to_hf.py")(
        ["--input_dir", str(serial), "--output_dir", str(tmp_path / "hf"), "--model", "bert"]
    )
    theirs = BertForPreTraining.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    source = open_source(serial)
    ours = serial_stage(
        source.model_config(),
        lambda region: source.read(f"model.{region.name}", region.start, region.size).float(),
        dtype=torch.float32,
    )
    train = built(folder, seq_length=SEQ_LENGTH, split="8,2").train
    samples = [train[i] for i in range(16)]
    tokens, types = (torch.from_numpy(np.stack([getattr(s, n) for s in samples])) for n in ("tokens", "token_types"))
    padding = torch.from_numpy(np.stack([s.segment_ids for s in samples]))
    assert padding.any() and types.any()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=1 - padding, token_type_ids=types)
        logits = ours(tokens, SEQ_LENGTH, segment_ids=padding, token_types=types)
    is_real = padding == 0
    assert (logits.tokens.transpose(0, 1)[is_real] - expected.prediction_logits[is_real]).abs().max() <= 1e-5
    assert (logits.next_sentence - expected.seq_relationship_logits).abs().max() <= 1e-5

    texts = ["A single man.", "It is a truth."], ["He must be in want of a wife.", "So."]
    own, encoded = BertWordPieceLowerCase(folder / "vocab.txt"), AutoTokenizer.from_pretrained(tmp_path / "hf")(*texts)
    for first, second, ids, kinds in zip(*texts, encoded["input_ids"], encoded["token_type_ids"], strict=True):
        parts = [own.cls, *own.encode(first), own.sep], [*own.encode(second), own.sep]
        assert (ids, kinds) == ([*parts[0], *parts[1]], [0] * len(parts[0]) + [1] * len(parts[1]))

    verify_correctness.main(
        [f"--load={serial}", f"--huggingface_path={tmp_path / 'hf'}", "--train_iters=2", "--device=cpu"]
    )
    assert "CORRECT" in capsys.readouterr().out


def refused(world: list[list[Ending]]) -> str:
    assert world[0][0].status == 2
    return world[0][0].err


def test_what_a_bert_cannot_train_on_is_said(folder, tmp_path):
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 500, "vocab_file": False}
    text = {"data_path": folder / "corpus.jsonl"}
    assert "--tokenizer_type NullTokenizer has no cls and no sep and" in refused(
        finetune_runs(1, argv(folder, tmp_path, **null))
    )
    assert f"{folder / 'corpus.jsonl'}: is text, and BERT's data is read from sentences; make them with" in refused(
        finetune_runs(1, argv(folder, tmp_path, **text))
    )


def built(folder: Path, *blend: object, **flags: object):
    tokenizer = BertWordPieceLowerCase(folder / "vocab.txt")
    usual = {"data_path": folder / "corpus_text_sentence", "seq_length": 16, "train_iters": 10, "eval_iters": 2}
    run = small_run(vocab_size=tokenizer.vocab_size, model_name="bert", global_batch_size=4, **{**usual, **flags})
    if blend:
        run = replace(run, data=replace(run.data, data_path=tuple(map(str, blend))))
    return build_datasets(run, tokenizer, Progress())


def test_split_cuts_documents_and_not_sentences(folder: Path):
    datasets = built(folder, split="50,30,20")
    bounds = datasets.train._indexed.document_indices
    parts = (datasets.train, datasets.validation["validation"], datasets.test["test"])
    for part, documents in zip(parts, (range(20), range(20, 32), range(32, 40)), strict=True):
        rows = part.pair_index
        assert rows[:, 0].min() >= bounds[documents.start] and rows[:, 2].max() <= bounds[documents.stop]
    assert describe_continuation(datasets, {"num_samples": {"train": 8}}) is None
    assert describe_continuation(datasets, built(folder, split="5,3,2").record) is None
    assert "the training data is not that" in str(describe_continuation(datasets, built(folder, split="6,3,1").record))


def test_a_part_of_one_document_has_no_other_for_second_texts(folder: Path):
    assert not built(folder, split="30,9,1").test
    with pytest.raises(DataError, match=r"of 40 documents leaves fewer than two for valid \(wanted: 8 samples\); give"):
        built(folder, split="39,1,0")


def test_sources_are_blended_by_weight(folder: Path):
    prefix = folder / "corpus_text_sentence"
    train = built(folder, 0.75, prefix, 0.25, prefix, split="1,0,0", eval_iters=0).train
    assert isinstance(train, EpochBlend) and len(train) == 40
    assert (train.dataset_index == 0).sum() == 30
    with pytest.raises(DataError, match=r"--max_epochs_per_dataset 0\.1 leaves .* samples, and 40 are wanted"):
        built(folder, max_epochs_per_dataset=0.1, split="1,0,0", eval_iters=0)
