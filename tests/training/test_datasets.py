"""The datasets of a run: cut by --split or of their own, alone or blended, with what happens at document ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data.blend import BlendedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import ConfigError, DataError
from megatron.tokenizer.null import NullTokenizer
from megatron.training.checkpointing import Progress
from megatron.training.datasets import RunDatasets, build_datasets, describe_continuation
from small_run import small_run

VOCABULARY = 500
EOD = VOCABULARY - 1


def write(prefix: Path, num_documents: int) -> Path:
    random = np.random.default_rng(num_documents)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for length in random.integers(1, 9, num_documents):
            writer.add_document(np.append(random.integers(0, EOD, length), EOD).astype(np.uint16))
    return prefix


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "a", 100), write(tmp_path / "b", 60)]


class WithEnd(NullTokenizer):
    eod = EOD


def built(tokenizer: NullTokenizer | None = None, **flags: object) -> RunDatasets:
    flags = {"data_path": False, "seq_length": 16, "train_iters": 10, "eval_iters": 2, "global_batch_size": 4, **flags}
    run = small_run(vocab_size=VOCABULARY, **flags)
    return build_datasets(run, tokenizer or NullTokenizer(VOCABULARY), Progress())


def test_a_split_gives_every_part_its_own_documents(parts: list[Path]):
    datasets = built(data_path=parts[0], split="50,30,20")
    assert set(datasets.train.document_index.tolist()) == set(range(50))  # type: ignore[attr-defined]
    assert set(datasets.validation["validation"].document_index.tolist()) == set(range(50, 80))  # type: ignore[attr-defined]
    assert set(datasets.test["test"].document_index.tolist()) == set(range(80, 100))  # type: ignore[attr-defined]
    assert datasets.num_samples == {"train": 40, "valid": 8, "test": 8}


def test_a_wanted_part_without_documents_is_an_error_but_for_the_test(parts: list[Path]):
    assert not built(data_path=parts[1], split="90,10,0.1").test
    with pytest.raises(DataError, match=r"leaves none for valid \(wanted: 8 samples\); give valid a larger share"):
        built(data_path=parts[1], split="1,0,0")
    assert not built(data_path=parts[1], split="1,0,0", eval_iters=0).validation


def test_positions_and_segments_start_anew_where_a_document_does(parts: list[Path]):
    plain = built(data_path=parts[0]).train
    flags = {"reset_position_ids": None, "reset_attention_mask": None, "eod_mask_loss": None}
    reset = built(WithEnd(VOCABULARY), data_path=parts[0], **flags).train
    for k in range(40):
        tokens, sample = plain[k].tokens, reset[k]
        assert plain[k].position_ids is None and plain[k].segment_ids is None
        assert np.array_equal(tokens, sample.tokens)
        # A document begins after each end-of-document token.
        segments = np.cumsum(np.concatenate(([0], tokens[:-2] == EOD)))
        positions = [i - int(np.flatnonzero(segments == segment)[0]) for i, segment in enumerate(segments)]
        assert sample.segment_ids is not None and sample.segment_ids.tolist() == segments.tolist()
        assert sample.position_ids is not None and sample.position_ids.tolist() == positions
        assert sample.loss_mask.tolist() == (tokens[:-1] != EOD).tolist()


def test_each_of_the_three_flags_stands_alone(parts: list[Path]):
    sample = built(data_path=parts[0], reset_position_ids=None).train[0]
    assert sample.position_ids is not None and sample.segment_ids is None and sample.loss_mask.all()
    sample = built(data_path=parts[0], reset_attention_mask=None).train[0]
    assert sample.position_ids is None and sample.segment_ids is not None and sample.loss_mask.all()


def test_what_follows_the_end_of_a_document_needs_an_end(parts: list[Path]):
    with pytest.raises(ConfigError, match="--eod_mask_loss: the NullTokenizer has no end-of-document token"):
        built(data_path=parts[0], eod_mask_loss=None)


def test_a_longer_run_says_whether_the_order_changes(parts: list[Path]):
    datasets = built(data_path=parts[0])
    assert describe_continuation(datasets, {"num_samples": {"train": 36}}) is None  # of 33 an epoch
    text = describe_continuation(datasets, {"num_samples": {"train": 4000}})
    assert text is not None and "was laid out for 4000 samples and this one for 40: the order" in text


def blended(parts: list[Path], *blend: object, **flags: object) -> RunDatasets:
    return built(config=config_file(parts, train_data_path=[str(value) for value in blend]), eval_iters=0, **flags)


def test_a_run_on_other_data_than_its_checkpoints_says_so(parts: list[Path], tmp_path: Path):
    a, b = parts
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("a.*"):
        (tmp_path / "moved" / file.name).write_bytes(file.read_bytes())
    other = write(tmp_path / "other", 101)
    record = blended(parts, 0.7, a, 0.3, b).record
    assert record["num_samples"] == {"train": 40, "valid": 0, "test": 0} and 0 <= record["fingerprint"] < 2**63
    for same in (
        blended(parts, 7, tmp_path / "moved" / "a", 3, b),
        blended(parts, 0.7, a, 0.3, b, seed=9),
        blended(parts, 0.7, a, 0.3, b),  # from the cache
    ):
        assert describe_continuation(same, record) is None
    for changed in (
        blended(parts, 0.7, other, 0.3, b),
        blended(parts, 0.6, a, 0.4, b),
        blended(parts, a, b),
        blended(parts, 0.3, b, 0.7, a),
        blended(parts, 0.7, a, 0.3, b, seq_length=8),
        blended(parts, a),
    ):
        text = describe_continuation(changed, record)
        assert text is not None and "the training data is not that of the checkpoint: its files, their weights" in text
        assert describe_continuation(changed, {"num_samples": {"valid": 0}}) is None  # of an older program


def test_one_dataset_is_the_same_data_however_it_is_named(parts: list[Path]):
    record = blended(parts, parts[0]).record
    for flags in ({}, {"max_epochs_per_dataset": 9}, {"fim_rate": 0}):
        assert blended(parts, 5, parts[0], **flags).record == record
    cut = built(data_path=parts[0], split="1,0,0", eval_iters=0)
    assert cut.record == record
    assert describe_continuation(built(data_path=parts[0]), record) is not None  # 97 of its 100 documents


def test_several_sources_are_blended_and_several_validation_sets_keep_their_names(parts: list[Path]):
    run = small_run(
        vocab_size=VOCABULARY, data_path=False, seq_length=16, train_iters=10, eval_iters=2, global_batch_size=4,
        config=config_file(
            parts,
            train_data_path=["0.75", str(parts[0]), "0.25", str(parts[1])],
            valid_data_path=[f"web={parts[0]}", f"code=1,{parts[0]},3,{parts[1]}"],
            test_data_path=[str(parts[1])],
        ),
    )  # fmt: skip
    datasets = build_datasets(run, NullTokenizer(VOCABULARY), Progress())
    assert isinstance(datasets.train, BlendedDataset)
    assert np.bincount(datasets.train.dataset_index).tolist() == [30, 10]
    assert list(datasets.validation) == ["validation_web", "validation_code"] and list(datasets.test) == ["test"]
    code = datasets.validation["validation_code"]
    assert isinstance(code, BlendedDataset) and np.bincount(code.dataset_index).tolist() == [2, 6]


def test_a_blend_is_cut_by_split_dataset_by_dataset(parts: list[Path]):
    run = small_run(
        vocab_size=VOCABULARY, data_path=False, seq_length=16, train_iters=10, eval_iters=2, global_batch_size=4,
        split="50,30,20", config=config_file(parts, data_path=["1", str(parts[0]), "1", str(parts[1])]),
    )  # fmt: skip
    datasets = build_datasets(run, NullTokenizer(VOCABULARY), Progress())
    validation = datasets.validation["validation"]
    assert isinstance(validation, BlendedDataset)
    documents = [set(part.document_index.tolist()) for part in validation.datasets]
    assert documents == [set(range(50, 80)), set(range(30, 48))]


def test_more_epochs_than_allowed_are_an_error_that_counts(parts: list[Path]):
    with pytest.raises(DataError, match=r"--max_epochs_per_dataset 1 leaves \d+ samples .* and 400 are wanted"):
        built(data_path=parts[0], train_iters=100, max_epochs_per_dataset=1)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("names", [["a.txt"], ["a.txt", "b.txt"]])
def test_tokens_and_indices_of_text_are_in_one_cache(names: list[str], chosen: bool, tmp_path: Path):
    (tmp_path / "text").mkdir()
    texts = [tmp_path / "text" / name for name in names]
    for text in texts:
        text.write_text(" ".join(map(str, range(100))))
    cache = tmp_path / "chosen" if chosen else tmp_path / "text" / "cache"
    file = config_file([tmp_path / "run"], train_data_path=[str(text) for text in texts])
    built(config=file, eval_iters=0, **({"data_cache_path": cache} if chosen else {}))
    assert {path.name[:2] for path in cache.glob("*.bin")} == {f"{name[0]}-" for name in names}
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    assert entry.name.startswith("gpt-" if len(names) == 1 else "blend-")
    assert sorted((tmp_path / "text").iterdir()) == sorted([*texts, *([] if chosen else [cache])])


def config_file(parts: list[Path], **values: list[str]) -> Path:
    lines = [f"{name}: [{', '.join(repr(value) for value in listed)}]" for name, listed in values.items()]
    file = parts[0].parent / "run.yaml"
    file.write_text("\n".join(lines))
    return file


class WithMiddle(WithEnd):
    """Ids stand for themselves, and the last three are the tokens of fill-in-the-middle."""

    def token_id(self, token: str) -> int | None:
        return {"<fim_prefix>": EOD - 3, "<fim_middle>": EOD - 2, "<fim_suffix>": EOD - 1}.get(token)


def test_the_middle_is_moved_in_as_many_documents_as_asked(parts: list[Path]):
    tokenizer = WithMiddle(VOCABULARY)
    flags: dict[str, object] = {"data_path": parts[0], "reset_attention_mask": None}
    plain = built(tokenizer, **flags).train
    assert np.array_equal(built(tokenizer, **flags, fim_rate=0).train[3].tokens, plain[3].tokens)
    moved, again = (built(tokenizer, **flags, fim_rate=1, fim_spm_rate=0).train for _ in range(2))
    for k in range(40):
        tokens, segments = moved[k].tokens, moved[k].segment_ids
        assert np.array_equal(tokens, again[k].tokens) and segments is not None
        firsts = np.flatnonzero(np.diff(segments, prepend=-1))
        # Only at the end there may be no room: six tokens for one, where a number is cut into three.
        assert min((first for first in firsts.tolist() if tokens[first] != EOD - 3), default=17) > 17 - 6
    with pytest.raises(ConfigError, match="--fim_rate: there is none of the tokens of the NullTokenizer"):
        built(**flags, fim_rate=0.5)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"fim_rate": 1.5}, "--fim_rate 1.5 is no share; use 0 to 1."),
        ({"fim_spm_rate": -1}, "--fim_spm_rate -1 is no share"),
        ({"fim_tokens": "<a>"}, "--fim_tokens <a>: 1 tokens; give three, those before prefix, middle and suffix."),
        (
            {"fim_rate": 0.5, "data_type": "instruction"},
            "--fim_rate 0.5 is about documents end to end; drop it, or --data_type instruction.",
        ),
    ],
)
def test_fill_in_the_middle_that_makes_no_sense_is_refused(parts: list[Path], flags: dict, reason: str):
    with pytest.raises(ConfigError, match=reason):
        built(data_path=parts[0], **flags)
