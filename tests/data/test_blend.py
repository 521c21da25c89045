"""Blends serve every dataset its share, in order, from data that is opened when it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.data import blend as blend_module
from megatron.data.blend import Blend, BlendedDataset, Member, Request, parse_blend, parse_named_blends
from megatron.data.gpt import DocumentBounds, GPTDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import ConfigError, DataError

VOCABULARY = 1000
WEIGHTS = (0.5, 0.3, 0.2)


def write(prefix: Path, first_token: int, num_documents: int = 30) -> Path:
    """Documents of three tokens, all from one hundred ids: each sample tells its dataset."""
    random = np.random.default_rng(first_token)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(num_documents):
            writer.add_document(random.integers(first_token, first_token + 100, 3).astype(np.uint16))
    return prefix


@pytest.fixture
def prefixes(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"part{i}", 100 * i) for i in range(3)]


def blended(prefixes: list[Path], num_samples: int = 60, **changes: object) -> BlendedDataset:
    members = [Member(prefix, lambda prefix=prefix: IndexedDataset(prefix)) for prefix in prefixes]  # type: ignore[misc]
    request = {
        "num_samples": num_samples,
        "sequence_length": 4,
        "seed": 5,
        "documents": range,
        "documents_key": "all",
        "vocab_size": VOCABULARY,
        "weights": WEIGHTS,
        **changes,
    }
    return BlendedDataset(members, Request(**request), DocumentBounds(), prefixes[0].parent / "cache")  # type: ignore[arg-type]


def test_each_sample_is_the_next_of_the_dataset_that_serves_it(prefixes: list[Path]):
    blend = blended(prefixes)
    counts = [0, 0, 0]
    alone = [
        GPTDataset(IndexedDataset(prefix), range(30), int(60 * weight), 4, 5)
        for prefix, weight in zip(prefixes, WEIGHTS, strict=True)
    ]
    for sample in (blend[k] for k in range(len(blend))):
        (which,) = set(sample.tokens // 100)
        assert np.array_equal(sample.tokens, alone[which][counts[which]].tokens)
        counts[which] += 1
    assert counts == [30, 18, 12]


def test_without_weights_every_dataset_counts_by_its_tokens(tmp_path: Path):
    prefixes = [write(tmp_path / "large", 0, 60), write(tmp_path / "small", 100, 20)]
    assert np.bincount(blended(prefixes, weights=None).dataset_index).tolist() == [45, 15]


def test_a_dataset_that_was_read_as_often_as_allowed_leaves_its_share_to_the_others(prefixes: list[Path]):
    """One epoch of 90 tokens is 22 samples of 4."""
    blend = blended(prefixes, max_epochs=1)
    counts = np.bincount(blend.dataset_index)
    assert counts[0] == 22 and counts.sum() == 60
    after = np.bincount(blend.dataset_index[np.flatnonzero(blend.dataset_index == 0)[-1] + 1 :], minlength=3)
    assert abs(after[1] / after.sum() - 0.6) <= 1 / after.sum()
    with pytest.raises(DataError, match=r"--max_epochs_per_dataset 1 leaves 66 samples of 4 tokens, and 67 are wanted"):
        blended(prefixes, 67, max_epochs=1)


def test_a_cached_blend_opens_no_dataset_before_it_is_read(prefixes: list[Path], monkeypatch: pytest.MonkeyPatch):
    expected = [sample.tokens.tolist() for sample in map(blended(prefixes).__getitem__, range(60))]
    opened: list[Path] = []

    def open_and_note(prefix: Path) -> IndexedDataset:
        opened.append(prefix)
        return IndexedDataset(prefix)

    members = [Member(prefix, lambda prefix=prefix: open_and_note(prefix)) for prefix in prefixes]  # type: ignore[misc]
    request = Request(60, 4, 5, range, "all", VOCABULARY, WEIGHTS)
    monkeypatch.setattr(blend_module, "_build", None)  # calling it would fail
    blend = BlendedDataset(members, request, DocumentBounds(), prefixes[0].parent / "cache")
    assert len(blend) == 60 and not opened
    assert [blend[k].tokens.tolist() for k in range(60)] == expected
    assert sorted(opened) == prefixes


def test_data_that_changed_is_never_read_by_the_old_index(prefixes: list[Path]):
    before = blended(prefixes)
    write(prefixes[1], 100, num_documents=7)
    after = blended(prefixes)
    assert len(before.datasets[1].document_index) == 30
    assert set(after.datasets[1].document_index.tolist()) == set(range(7))


@pytest.mark.parametrize(
    "change", [{"num_samples": 59}, {"seed": 6}, {"sequence_length": 5}, {"weights": (0.5, 0.2, 0.3)}]
)
def test_every_part_of_a_request_is_part_of_the_cache_key(prefixes: list[Path], change: dict[str, object]):
    first = blended(prefixes)
    again, other = blended(prefixes), blended(prefixes, **change)  # type: ignore[arg-type]
    assert np.array_equal(first.dataset_index, again.dataset_index)
    assert len(list((prefixes[0].parent / "cache").glob("blend-*/"))) == 2
    assert [other[k].tokens.tolist() for k in range(20)] != [first[k].tokens.tolist() for k in range(20)] or len(
        other
    ) != len(first)


def test_the_order_is_the_same_for_another_length_unless_the_epochs_of_a_dataset_change(prefixes: list[Path]):
    blend = blended(prefixes, 40)  # 20, 12 and 8 samples: each less than an epoch of 22
    assert blend.has_same_order_for(30) and blend.has_same_order_for(44)
    assert not blend.has_same_order_for(60)


def test_a_number_of_samples_that_the_limits_leave_no_room_for_has_another_order(prefixes: list[Path]):
    """What a run asks that is shorter than the one it continues, and limited."""
    blend = blended(prefixes, 60, max_epochs=1)
    assert blend.has_same_order_for(66) and not blend.has_same_order_for(67)


def test_ids_beyond_the_vocabulary_are_an_error_before_training(prefixes: list[Path]):
    with pytest.raises(DataError, match="is outside the vocabulary of 250"):
        blended(prefixes, vocab_size=250)


def test_a_dataset_without_documents_in_the_split_is_left_out(prefixes: list[Path], tmp_path: Path):
    tiny = write(tmp_path / "tiny", 300, num_documents=1)
    blend = blended([*prefixes, tiny], weights=(1.0, 1.0, 1.0, 1.0), documents=lambda n: range(n // 2, n // 2 + n // 3))
    assert np.bincount(blend.dataset_index, minlength=4).tolist() == [20, 20, 20, 0]
    with pytest.raises(DataError, match="the 1 datasets of the blend hold 0 tokens for this split"):
        blended([tiny], weights=(1.0,), documents=lambda n: range(0))


def test_a_missing_file_is_named(prefixes: list[Path], tmp_path: Path):
    with pytest.raises(DataError, match=r"absent: there is no tokenized dataset of this name"):
        blended([*prefixes, tmp_path / "absent"], weights=None)


def test_weights_and_paths_are_told_apart():
    assert parse_blend("--data_path", ["a", "b"]) == Blend(("a", "b"))
    assert parse_blend("--data_path", ["0.3", "a", "7e-1", "b"]) == Blend(("a", "b"), (0.3, 0.7))
    for values in (["a", "0.3"], ["0.3", "a", "b"], ["0.3"], ["0.3", "0.7"]):
        with pytest.raises(ConfigError, match="is neither paths nor weights and paths in turns"):
            parse_blend("--data_path", values)
    with pytest.raises(ConfigError, match="weight nan is no share"):
        parse_blend("--data_path", ["nan", "a"])


def test_named_sets_may_be_blends():
    assert parse_named_blends("--valid_data_path", ["web=a", "code=1,b,2,c"], "validation") == {
        "web": Blend(("a",)),
        "code": Blend(("b", "c"), (1.0, 2.0)),
    }
    assert parse_named_blends("--valid_data_path", ["1", "a", "2", "b"], "validation") == {
        "validation": Blend(("a", "b"), (1.0, 2.0))
    }
    assert parse_named_blends("--valid_data_path", [], "validation") == {}
