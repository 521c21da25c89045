"""finetune.py --data_type instruction, as a user types it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune_runs import VOCAB_SIZE, command, finetune_succeeds
from instruct_files import write_conversations
from megatron.errors import ConfigError, DataError
from megatron.tokenizer.null import NullTokenizer
from megatron.training.checkpointing import Progress
from megatron.training.datasets import RunDatasets, build_datasets, describe_continuation
from megatron.training.sinks import METRICS_FILE, read_metrics
from small_run import small_run

LENGTHS = np.random.default_rng(1).integers(2, 25, 80).tolist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "chat", LENGTHS, vocab_size=VOCAB_SIZE)


def argv(data: Path, save: Path, **flags: object) -> list[str]:
    usual = {"data_type": "instruction", "hidden_dropout": 0, "attention_dropout": 0, "train_iters": 6, **flags}
    return command(data, save=save, **usual)


def figures(folder: Path, *names: str) -> list[float | int | None]:
    lines = read_metrics(folder / METRICS_FILE)
    return [line[name] for line in lines for name in names or ("lm_loss", "validation_loss") if name in line]


@pytest.fixture(scope="module")
def serial(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process on padded samples, and one on packs."""
    folder = tmp_path_factory.mktemp("serial")
    outs = finetune_succeeds(
        1, argv(data, folder / "padded"), argv(data, folder / "packed", packing=None, scalar_loss_mask=0.1)
    )
    (folder / "padded.txt").write_text(outs[0])
    (folder / "packed.txt").write_text(outs[1])
    return folder


def test_the_summary_says_what_is_cut_and_how_full_the_packs_are(serial: Path):
    train = LENGTHS[:64]
    long = [length for length in train if length > 17]
    text = f"{len(long)} are longer than --seq_length 16 and are cut, which loses {sum(long) - 17 * len(long)} tokens"
    assert f"64 conversations; {text}" in (serial / "padded.txt").read_text()
    assert f"of whose slots hold a token; {text}" in (serial / "packed.txt").read_text()


@pytest.mark.parametrize(
    ("world_size", "kind", "flags"),
    [
        (2, "padded", {"variable_seq_lengths": None, "tensor_model_parallel_size": 2, "sequence_parallel": None}),
        (2, "padded", {"variable_seq_lengths": None, "pipeline_model_parallel_size": 2, "micro_batch_size": 2}),
        (2, "packed", {"variable_seq_lengths": None, "micro_batch_size": 2, "zero_stage": 2}),
        (4, "packed", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ],
)
def test_layouts_and_variable_lengths_have_the_losses_of_one_process(data, serial, tmp_path, world_size, kind, flags):
    packed = {"packing": None, "scalar_loss_mask": 0.1} if kind == "packed" else {}
    finetune_succeeds(world_size, argv(data, tmp_path, **packed, **flags))
    assert figures(tmp_path) == pytest.approx(figures(serial / kind), rel=1e-5)


def test_a_stopped_run_goes_on_on_other_ranks_as_if_it_had_not_stopped(data, serial, tmp_path):
    finetune_succeeds(1, argv(data, tmp_path, save_interval=3, exit_interval=3))
    out = finetune_succeeds(2, argv(data, tmp_path, load=tmp_path, micro_batch_size=2, num_workers=3))[0]
    assert "the order of the samples changes" not in out
    losses = dict(zip(figures(tmp_path, "iteration"), figures(tmp_path, "lm_loss"), strict=False))
    assert list(losses.values()) == pytest.approx(figures(serial / "padded", "lm_loss"), rel=1e-5)


def built(**flags: object) -> RunDatasets:
    usual = {"data_path": False, "seq_length": 16, "train_iters": 10, "eval_iters": 2, "global_batch_size": 4}
    run = small_run(vocab_size=VOCAB_SIZE, **{**usual, "data_type": "instruction", **flags})
    return build_datasets(run, NullTokenizer(VOCAB_SIZE), Progress())


def tokens(data: object, num: int) -> set[tuple[int, ...]]:
    return {tuple(data[k].tokens.tolist()) for k in range(num)}  # type: ignore[index]


def test_splits_and_sets_of_their_own_share_no_conversation(data: Path, tmp_path: Path):
    datasets = built(data_path=data, split="50,25,25")
    parts = [datasets.train, datasets.validation["validation"], datasets.test["test"]]
    assert [part.documents for part in parts] == [range(40), range(40, 60), range(60, 80)]  # type: ignore[attr-defined]
    # 40 samples are one epoch of the first 40 conversations; two are alike by chance.
    assert len(tokens(datasets.train, 40)) >= 38
    other = write_conversations(tmp_path / "other", [5] * 9, vocab_size=VOCAB_SIZE, seed=3)
    datasets = built(train_data_path=data, valid_data_path=f"own={other}")
    assert list(datasets.validation) == ["validation_own"] and tokens(datasets.validation["validation_own"], 8)
    assert datasets.padding is not None and datasets.padding.limit == 16


def test_a_blend_is_in_shares_and_its_order_does_not_depend_on_the_runs_length(data: Path, tmp_path: Path):
    other = write_conversations(tmp_path / "other", [5] * 9, vocab_size=VOCAB_SIZE, seed=3)
    flags = {"eval_iters": 0, "split": "1,0,0"}
    run = small_run(vocab_size=VOCAB_SIZE, data_type="instruction", seq_length=16, global_batch_size=4, **flags)
    run = replace(run, data=replace(run.data, data_path=("0.75", str(data), "0.25", str(other))))
    datasets = build_datasets(run, NullTokenizer(VOCAB_SIZE), Progress())
    served = datasets.train.dataset_index  # type: ignore[attr-defined]
    assert np.count_nonzero(served == 1) == len(served) // 4
    assert describe_continuation(datasets, {"num_samples": {"train": 8}}) is None
    assert describe_continuation(datasets, datasets.record) is None
    on_one = build_datasets(
        replace(run, data=replace(run.data, data_path=(str(data),))), NullTokenizer(VOCAB_SIZE), Progress()
    )
    assert "the training data is not that of the checkpoint" in str(describe_continuation(on_one, datasets.record))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"data_type": "gpt", "packing": None}, ConfigError, "--packing is about conversations; give --data_type"),
        ({"data_type": "gpt", "loss_role": "user"}, ConfigError, "--loss_role user is about conversations"),
        ({"data_type": "gpt", "scalar_loss_mask": 0.5}, ConfigError, "--scalar_loss_mask 0.5 is about conversations"),
        ({"data_type": "gpt", "variable_seq_lengths": None}, ConfigError, "--variable_seq_lengths is about"),
        ({"reset_attention_mask": None}, ConfigError, "--reset_attention_mask is about documents end to end"),
        ({"eod_mask_loss": None}, ConfigError, "--eod_mask_loss is about documents end to end"),
        ({"scalar_loss_mask": -1}, ConfigError, "--scalar_loss_mask -1 is no weight"),
        ({"data_path": "x.jsonl"}, DataError, "x.jsonl: is text, .* make them with tools/preprocess_instruct_data.py"),
        (
            {"data_path": "none"},
            DataError,
            "--data_type instruction reads none-text and -role, as .*: none-text: there is no",
        ),
    ],
)
def test_mistakes_are_explained(flags: dict[str, object], error: type[Exception], message: str, data: Path):
    with pytest.raises(error, match=message):
        built(**{"data_path": data, **flags})
