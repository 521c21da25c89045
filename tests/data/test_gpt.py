"""GPT samples: Megatron-LM's order, each token where it belongs, every request answered or refused."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron.data.gpt import DocumentBounds, GPTDataset, IndexRequest
from megatron.data.gpt_index import EpochPlan, plan_epochs
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
ORDERS = sorted((SAMPLES / "gpt" / "megatron_lm").glob("*.json"))


def base() -> IndexedDataset:
    return IndexedDataset(SAMPLES / "gpt" / "base")


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16") -> IndexedDataset:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=dtype))
    return IndexedDataset(prefix)


def stream_of(dataset: GPTDataset, indexed: IndexedDataset) -> np.ndarray:
    return np.concatenate([indexed.get(int(document)) for document in dataset.document_index]).astype(np.int64)


@pytest.mark.parametrize("path", ORDERS, ids=lambda path: path.stem)
def test_indices_and_samples_are_megatron_lms(path: Path, tmp_path: Path):
    facts = json.loads(path.read_text())
    dataset = GPTDataset(
        base(),
        range(*facts["document_range"]),
        facts["num_samples"],
        facts["sequence_length"],
        facts["random_seed"],
        cache_path=tmp_path,
    )
    assert len(dataset) == facts["len"]
    for name in ("document_index", "sample_index", "shuffle_index"):
        assert getattr(dataset, name).tolist() == facts[name]
        assert getattr(dataset, name).dtype == facts[f"{name}_dtype"]
    for index, sample in enumerate(facts["samples"]):
        assert dataset[index].tokens.tolist() == [*sample["tokens"], sample["last_label"]]


def test_positions_and_bounds_of_documents_are_megatron_lms(tmp_path: Path):
    facts = json.loads((SAMPLES / "gpt" / "megatron_lm" / "inter_document_masking_s64.json").read_text())
    bounds = DocumentBounds(reset_positions=True, reset_attention=True)
    dataset = GPTDataset(base(), range(60), facts["num_samples"], 64, 1234, bounds=bounds, cache_path=tmp_path)
    for index, expected in enumerate(facts["samples"]):
        sample = dataset[index]
        assert sample.position_ids is not None and sample.segment_ids is not None
        assert sample.position_ids.tolist() == expected.get("position_ids", list(range(64)))
        cuts = np.flatnonzero(np.diff(sample.segment_ids)) + 1
        # An empty document has a bound of its own there, and no token here.
        assert [0, *cuts.tolist(), 64] == sorted(set(expected["cu_seqlens_unpadded"]))


def epochs_one_by_one(tokens_per_epoch: int, sequence_length: int, num_samples: int) -> EpochPlan:
    """The rule as a reader would count it: add epochs until the tokens suffice."""
    num_epochs = 1
    while num_epochs * tokens_per_epoch < num_samples * sequence_length + 1:
        num_epochs += 1
    if num_epochs == 1:
        return EpochPlan(1, False, 0)
    before = ((num_epochs - 1) * tokens_per_epoch - 1) // sequence_length
    share = int(0.80 * ((tokens_per_epoch - 1) // sequence_length))
    return EpochPlan(num_epochs, num_samples - before < share, before)


def test_number_of_epochs_equals_counting_them_one_by_one():
    for tokens in (1, 2, 7, 31, 32, 33, 1000):
        for sequence_length in (1, 4, 32):
            for num_samples in (1, 2, 3, 31, 100):
                assert plan_epochs(tokens, sequence_length, num_samples) == epochs_one_by_one(
                    tokens, sequence_length, num_samples
                )


def test_a_last_epoch_shuffled_apart_keeps_its_documents_and_samples_last(tmp_path: Path):
    dataset = GPTDataset(base(), range(60), 120, 32, 1234, cache_path=tmp_path)
    assert sorted(dataset.document_index[:60]) == sorted(dataset.document_index[60:]) == list(range(60))
    assert sorted(dataset.shuffle_index[:87]) == list(range(87))


def test_every_sample_is_its_window_of_the_token_stream(tmp_path: Path):
    indexed = base()
    dataset = GPTDataset(indexed, range(10, 50), 200, 13, 5, cache_path=tmp_path)
    stream = stream_of(dataset, indexed)
    for index in range(len(dataset)):
        start = 13 * int(dataset.shuffle_index[index])
        sample = dataset[index]
        assert sample.tokens.dtype == np.int64 and sample.loss_mask.dtype == np.float32
        np.testing.assert_array_equal(sample.tokens, stream[start : start + 14])
        assert sample.loss_mask.tolist() == [1.0] * 13


def test_one_epoch_without_dropping_predicts_every_token_but_the_first_exactly_once(tmp_path: Path):
    indexed = base()
    dataset = GPTDataset(indexed, range(60), None, 32, 1, drop_last_partial=False, cache_path=tmp_path)
    in_order = sorted(range(len(dataset)), key=lambda index: int(dataset.shuffle_index[index]))
    labels = [dataset[index].tokens[1:][dataset[index].loss_mask == 1] for index in in_order]
    np.testing.assert_array_equal(np.concatenate(labels), stream_of(dataset, indexed)[1:])
    assert len(dataset) == 88


def test_an_index_outside_the_dataset_is_an_index_error(tmp_path: Path):
    dataset = GPTDataset(base(), range(60), None, 32, 1, cache_path=tmp_path)
    for index in (-1, 87):
        with pytest.raises(IndexError, match=f"sample {index} of a dataset of 87"):
            dataset[index]


def test_a_longer_continuation_knows_whether_the_order_changes(tmp_path: Path):
    """2790 tokens are 87 samples of 32: 120 samples take a second epoch shuffled apart, 170 a mixed one."""
    by_length = {
        num_samples: GPTDataset(base(), range(60), num_samples, 32, 1234, cache_path=tmp_path)
        for num_samples in (20, 87, 120, 125, 170)
    }
    for first, dataset in by_length.items():
        for second, other in by_length.items():
            same = np.array_equal(dataset.shuffle_index, other.shuffle_index) and np.array_equal(
                dataset.document_index, other.document_index
            )
            assert dataset.has_same_order_for(second) == same == (dataset.fingerprint == other.fingerprint), (
                first,
                second,
            )
    assert by_length[120].has_same_order_for(125) and not by_length[120].has_same_order_for(170)


# The cache


def forbid_building(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("built although it was cached")

    monkeypatch.setattr("megatron.data.gpt.build_indices", fail)


def test_indices_are_cached_beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    indexed = write(tmp_path / "data", [[1, 2, 3, 4, 5]])
    first = GPTDataset(indexed, range(1), None, 2, 1)
    forbid_building(monkeypatch)
    second = GPTDataset(indexed, range(1), None, 2, 1)
    assert second.sample_index.tolist() == first.sample_index.tolist()
    assert (tmp_path / "cache").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"document_range": range(1, 60)},
        {"num_samples": 500},
        {"sequence_length": 31},
        {"seed": 2},
        {"drop_last_partial": False},
    ],
)
def test_everything_the_order_depends_on_is_part_of_the_cache_key(change: dict, tmp_path: Path):
    options = {"document_range": range(60), "num_samples": None, "sequence_length": 32, "seed": 1}
    GPTDataset(base(), **options, cache_path=tmp_path / "shared")
    options |= change
    through_cache = GPTDataset(base(), **options, cache_path=tmp_path / "shared")
    fresh = GPTDataset(base(), **options, cache_path=tmp_path / "fresh")
    for name in ("document_index", "sample_index", "shuffle_index"):
        np.testing.assert_array_equal(getattr(through_cache, name), getattr(fresh, name))


def test_data_made_again_at_the_same_path_gets_new_indices(tmp_path: Path):
    prefix = tmp_path / "data"
    GPTDataset(write(prefix, [[1, 2, 3], [4, 5, 6, 7, 8, 9]]), range(2), None, 2, 1)
    indexed = write(prefix, [[1, 2, 3, 4, 5, 6], [7, 8, 9]])
    dataset = GPTDataset(indexed, range(2), None, 2, 1)
    stream = stream_of(dataset, indexed)
    for index in range(len(dataset)):
        start = 2 * int(dataset.shuffle_index[index])
        assert dataset[index].tokens.tolist() == stream[start : start + 3].tolist()


def test_a_copied_dataset_uses_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    GPTDataset(base(), range(60), None, 32, 1, cache_path=tmp_path)
    for suffix in (".bin", ".idx"):
        shutil.copy(SAMPLES / "gpt" / f"base{suffix}", tmp_path / f"copy{suffix}")
    forbid_building(monkeypatch)
    GPTDataset(IndexedDataset(tmp_path / "copy"), range(60), None, 32, 1, cache_path=tmp_path)


# Requests that cannot be answered


@pytest.mark.parametrize(
    ("documents", "num_samples", "sequence_length", "reason"),
    [
        (range(5, 5), 10, 4, "no documents in 5 to 5 of 60; choose other data or another --split"),
        (range(59, 60), 10, 4, "documents 59 to 60 hold 0 tokens, which is no sample"),
        (range(12, 13), None, 4, "documents 12 to 13 hold 1 tokens, less than one sample of sequence length 4 plus"),
        (range(61), 10, 4, r"range\(0, 61\) is not a range of its 60 documents"),
        (range(0, 60, 2), 10, 4, "is not a range of its 60 documents"),
        (range(60), 0, 4, "0 samples were asked for; ask for at least one"),
        (range(60), 10, 0, "sequence length 0 is not a length; use --seq_length 1 or more"),
    ],
)
def test_a_request_without_an_answer_is_an_error(
    documents: range, num_samples: int | None, sequence_length: int, reason: str, tmp_path: Path
):
    with pytest.raises(DataError, match=reason):
        GPTDataset(base(), documents, num_samples, sequence_length, 1, cache_path=tmp_path)


def test_values_that_are_no_ids_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds float32 values, which are not token ids"):
        GPTDataset(IndexedDataset(SAMPLES / "indexed" / "mlm_f32_code7"), range(2), 1, 1, 1, cache_path=tmp_path)


def test_planning_epochs_of_no_tokens_is_an_error_and_not_an_endless_loop():
    with pytest.raises(DataError, match="0 tokens in the documents, so that no number of epochs gives a sample"):
        plan_epochs(0, 32, 10)


def test_fewer_tokens_than_a_sample_are_repeated_until_it_is_full(tmp_path: Path):
    dataset = GPTDataset(write(tmp_path / "data", [[7, 8]]), range(1), 1, 4, 1)
    assert dataset[0].tokens.tolist() == [7, 8, 7, 8, 7]


class ManyDocuments:
    """Documents of one token each, without the tokens."""

    prefix, dtype = "many", np.dtype(np.uint16)

    def __init__(self, num_documents: int):
        self.sequence_lengths = np.ones(num_documents, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.sequence_lengths)


def test_building_holds_no_more_than_two_indices_at_once(monkeypatch: pytest.MonkeyPatch):
    """4 bytes a document that is read and 8 a sample, in whichever order; then the order of the samples."""
    monkeypatch.setattr("megatron.data.gpt_index._COUNTED_AT_ONCE", 1 << 10)
    request = IndexRequest(ManyDocuments(100_000), range(100_000), None, 3, 5)  # type: ignore[arg-type]
    forms: dict[str, object] = {}
    tracemalloc.start()
    request.build(lambda name, array: forms.update({name: (array.shape, array.dtype)}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert forms == request.sizes.arrays
    assert peak < 4 * 100_000 + 8 * 33_333 + 40_000
