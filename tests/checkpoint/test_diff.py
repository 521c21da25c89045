"""Two sources are equal if every bit is; what differs is counted and measured, whatever the number of workers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_samples import INFO
from megatron.checkpoint import diff
from megatron.checkpoint.diff import Difference, compare
from megatron.checkpoint.manager import save
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.source import CheckpointInfo, LocalTensor
from megatron.core.sharding import Region
from megatron.core.topology import Axis


def source_of(root: Path, tensors: dict[str, Tensor], info: CheckpointInfo = INFO) -> NativeSource:
    held = []
    for name, tensor in tensors.items():
        kind, _, logical = name.partition("/")
        shape, origin = tuple(tensor.shape), (0,) * tensor.dim()
        held.append(LocalTensor(kind, [Region(logical, shape, origin, shape, origin)], tensor))
    return NativeSource(save(root, info, held, Axis("world")))


@pytest.fixture
def difference(tmp_path: Path):
    def difference(one: dict[str, Tensor], other: dict[str, Tensor], **options: object) -> Difference:
        sources = source_of(tmp_path / "1", one), source_of(tmp_path / "2", other)
        return compare(*sources, on_bytes=lambda num_bytes: None, **options)  # type: ignore[arg-type]

    return difference


def test_the_same_bits_are_equal_nan_and_all(difference) -> None:
    tensor = torch.tensor([1.0, math.nan, math.inf, -0.0])
    found = difference({"model/x": tensor}, {"model/x": tensor.clone()})
    assert found.is_empty and found.num_compared == 1


def test_zeros_of_different_sign_differ_by_nothing_and_are_not_equal(difference) -> None:
    (found,) = difference({"model/x": torch.zeros(3)}, {"model/x": torch.tensor([0.0, -0.0, 0.0])}).tensors
    assert (found.num_different, found.max_abs) == (1, 0.0)


def test_a_nan_against_a_number_is_no_small_difference(difference) -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([math.nan, 9.0])
    (found,) = difference({"model/x": one}, {"model/x": other}).tensors
    assert found.num_different == 2 and math.isnan(found.max_abs)


def test_the_largest_difference_is_found_wherever_it_is(difference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read a few at a time: the chunk with the largest difference is neither first nor last."""
    monkeypatch.setattr(diff, "_CHUNK_BYTES", 64)
    one = torch.zeros(40, 4)
    other = one.clone()
    other[3, 1], other[21, 2], other[39, 0] = 0.5, -2.0, 1.0
    for num_workers in (1, 2):
        (found,) = difference({"model/x": one}, {"model/x": other}, num_workers=num_workers).tensors
        assert (found.num_different, found.max_abs) == (3, 2.0)


def test_another_dtype_is_a_difference_even_of_equal_values(difference) -> None:
    (found,) = difference({"model/x": torch.ones(3)}, {"model/x": torch.ones(3).bfloat16()}).tensors
    assert str(found) == "model.x: float32 and bfloat16, with the same values"
    (found,) = difference({"model/x": torch.full((3,), 1.001)}, {"model/x": torch.ones(3).bfloat16()}).tensors
    assert str(found) == "model.x: float32 and bfloat16, 3 of 3 elements differ, by at most 0.001"


def test_shapes_and_names_that_differ_are_listed(difference) -> None:
    one = {"model/x": torch.ones(3), "model/y": torch.ones(1), "optimizer.exp_avg/y": torch.ones(1)}
    found = difference(one, {"model/x": torch.ones(4), "model/z": torch.ones(1)})
    assert [str(tensor) for tensor in found.tensors] == ["model.x: shape [3] and [4]"]
    assert found.missing == (("model.z",), ("model.y", "optimizer.exp_avg.y"))
    assert difference(one, one | {"optimizer.exp_avg/y": torch.zeros(1)}, weights_only=True).is_empty


def test_settings_of_model_and_run_are_compared(tmp_path: Path) -> None:
    state = dataclasses.replace(INFO.state, consumed_samples=41, config={"training": {"lr": 1.0}})
    model = dataclasses.replace(INFO.model, rope_theta=5.0)
    sources = (
        source_of(tmp_path / "1", {"model/x": torch.ones(3)}),
        source_of(tmp_path / "2", {"model/x": torch.ones(3)}, CheckpointInfo(state, model, "llama")),
    )
    assert compare(*sources, on_bytes=lambda num_bytes: None).settings == (
        ("model.rope_theta", 10000.0, 5.0),
        ("model_name", "llama2", "llama"),
        ("consumed_samples", 40, 41),
        ("config.training.lr", None, 1.0),
    )
