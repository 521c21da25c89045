"""Any layout loads what any other saved, and every kind of damage is one clear error."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_samples import CONFIG, INFO, VOCAB, blank_like, held_by, save_from_one_process, whole_tensors
from megatron.checkpoint.locate import find_checkpoint, list_iterations
from megatron.checkpoint.manager import check_architecture, load, save
from megatron.checkpoint.manifest import MANIFEST_FILE
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.source import LocalTensor, Source, load_tensors
from megatron.core.layout import ParallelLayout
from megatron.core.sharding import Region
from megatron.core.topology import Axis
from megatron.errors import CheckpointError
from megatron.model.config import RopeScaling

WORLD = Axis("world")
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tp=2, pp=2),
    ParallelLayout(tp=4),  # two copies of each key/value head
    ParallelLayout(tp=8, pp=1),
    ParallelLayout(pp=3, tp=2),
    ParallelLayout(dp=3),
    ParallelLayout(dp=2, tp=2, pp=2),
    ParallelLayout(dp=5, pp=5),
]
ROWS = {"replicated": False, "rows over data ranks": True}


def load_whole(source: Source) -> dict[str, torch.Tensor]:
    return {name: source.read(name, (0,) * len(source.shape(name)), source.shape(name)) for name in source.names()}


def assert_equal(held: list[LocalTensor], expected: list[LocalTensor]) -> None:
    assert len(held) == len(expected)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(held, expected, strict=True))


@pytest.mark.parametrize("by_rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_any_layout_loads_what_any_other_saved_bitwise(tmp_path: Path, saved: ParallelLayout, by_rows: bool) -> None:
    save_from_one_process(tmp_path, saved, by_rows=by_rows)
    whole = whole_tensors()
    source = open_source(tmp_path)
    for layout in LAYOUTS:
        for rank in range(layout.world_size):
            expected = held_by(layout, rank, whole, by_rows=True)
            held = blank_like(expected)
            load(source, held, WORLD)
            assert_equal(held, expected)


def test_the_stored_vocabulary_is_unpadded_and_everything_else_comes_back(tmp_path: Path) -> None:
    save_from_one_process(tmp_path, ParallelLayout(tp=4))
    source = open_source(tmp_path)
    assert source.shape("model.embedding.word.weight")[0] == VOCAB
    assert (source.state(), source.model_config(), source.model_name(), source.tokenizer()) == (
        INFO.state,
        CONFIG,
        "llama2",
        INFO.tokenizer,
    )
    whole = whole_tensors()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_whole(source).items())


def test_nested_model_config_comes_back(tmp_path: Path) -> None:
    model = dataclasses.replace(CONFIG, position_embedding_type="rotary", rope_scaling=RopeScaling("llama3", 8.0))
    save_from_one_process(tmp_path, ParallelLayout(), info=dataclasses.replace(INFO, model=model))
    assert open_source(tmp_path).model_config() == model


def test_one_process_writes_plain_named_weights(tmp_path: Path) -> None:
    folder = save_from_one_process(tmp_path, ParallelLayout())
    loaded = load_file(folder / "rank_00000.safetensors")
    whole = whole_tensors()
    assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_save_without_a_process_group_is_what_open_source_finds(tmp_path: Path) -> None:
    held = held_by(ParallelLayout(), 0, whole_tensors(), by_rows=False)
    folder = save(tmp_path, INFO, held, WORLD)
    assert folder == tmp_path / "iter_0000010" == find_checkpoint(tmp_path)
    for path in (tmp_path, folder):
        restored = blank_like(held)
        load(open_source(path), restored, WORLD)
        assert_equal(restored, held)


def test_values_widen_silently_and_are_rounded_only_on_request(tmp_path: Path) -> None:
    save_from_one_process(tmp_path / "bf16", ParallelLayout(), dtype=torch.bfloat16)
    save_from_one_process(tmp_path / "fp32", ParallelLayout())
    region = Region("final_norm.weight", (24,), (0,), (24,), (0,))
    wide, narrow = (LocalTensor("model", [region], torch.zeros(24, dtype=d)) for d in (torch.float32, torch.bfloat16))
    expected = whole_tensors()["model.final_norm.weight"].bfloat16()
    load_tensors(open_source(tmp_path / "bf16"), [wide])
    assert torch.equal(wide.tensor, expected.float())
    with pytest.raises(CheckpointError, match=r"model\.final_norm\.weight is torch\.float32 and would be rounded"):
        load_tensors(open_source(tmp_path / "fp32"), [narrow])
    load_tensors(open_source(tmp_path / "fp32"), [narrow], narrow=True)
    assert torch.equal(narrow.tensor, expected)


def test_entries_that_are_missing_or_of_another_shape_are_listed_at_once(tmp_path: Path) -> None:
    save_from_one_process(tmp_path, ParallelLayout())
    regions = [
        Region("final_norm.weight", (25,), (0,), (25,), (0,)),
        Region("final_norm.bias", (24,), (0,), (24,), (0,)),
        Region("layers.9.norm.weight", (24,), (0,), (24,), (0,)),
    ]
    with pytest.raises(CheckpointError) as error:
        load_tensors(open_source(tmp_path), [LocalTensor("model", [r], torch.zeros(r.size)) for r in regions])
    for part in (
        "model.final_norm.weight has shape [24], not [25]",
        "model.final_norm.bias is missing",
        "model.layers.9.norm.weight is missing",
    ):
        assert part in str(error.value)


def test_all_differences_of_architecture_are_listed_at_once(tmp_path: Path) -> None:
    other = dataclasses.replace(CONFIG, num_layers=6, glu_activation="swiglu", hidden_dropout=0.5)
    with pytest.raises(CheckpointError) as error:
        check_architecture(tmp_path, CONFIG, other)
    assert "num_layers is 5 in the checkpoint and 6 in the run" in str(error.value)
    assert "glu_activation is None in the checkpoint and swiglu in the run" in str(error.value)
    assert "dropout" not in str(error.value) and "--use_checkpoint_args" in str(error.value)


def test_dropout_and_the_longest_rotary_sequence_are_not_architecture(tmp_path: Path) -> None:
    rotary = dataclasses.replace(CONFIG, position_embedding_type="rotary")
    longer = dataclasses.replace(rotary, max_position_embeddings=4096, attention_dropout=0.0)
    check_architecture(tmp_path, rotary, longer)
    with pytest.raises(CheckpointError, match="max_position_embeddings is 64 in the checkpoint and 4096 in the run"):
        check_architecture(tmp_path, CONFIG, dataclasses.replace(CONFIG, max_position_embeddings=4096))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of iteration 10, saved at TP2 PP2."""
    return save_from_one_process(tmp_path, ParallelLayout(tp=2, pp=2))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 8
    path.write_bytes(content)


def expect_error(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_whole(open_source(folder))
    for part in parts:
        assert part in str(error.value), str(error.value)


def test_a_flipped_bit_in_the_data_names_file_and_tensor(checkpoint: Path) -> None:
    flip(checkpoint / "rank_00001.safetensors", -5)
    expect_error(checkpoint, "rank_00001.safetensors: the tile at rows ", " of optimizer.exp_avg_sq.layers.")


def test_a_flipped_bit_in_the_header_names_the_file(checkpoint: Path) -> None:
    flip(checkpoint / "rank_00002.safetensors", 40)
    expect_error(checkpoint, "rank_00002.safetensors: the header (bytes 0 to ")


@pytest.mark.parametrize("position", [2, 12, 200, -2])
def test_a_flipped_bit_in_the_manifest_is_found(checkpoint: Path, position: int) -> None:
    flip(checkpoint / MANIFEST_FILE, position)
    expect_error(checkpoint, f"{MANIFEST_FILE} is damaged")


def test_the_manifest_is_json_that_anybody_can_read(checkpoint: Path) -> None:
    content = json.loads((checkpoint / MANIFEST_FILE).read_text())
    assert content["format_version"] == 2 and content["state"]["consumed_samples"] == 40


def rewrite_manifest(folder: Path, old: str, new: str) -> None:
    """Changes the content and makes the checksum right again, as another program's version would."""
    body = (folder / MANIFEST_FILE).read_text().partition("\n")[2]
    assert old in body
    body = body.replace(old, new, 1)
    (folder / MANIFEST_FILE).write_text(f'{{"crc32": "{zlib.crc32(body.encode()):08x}",\n{body}')


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 2', '"format_version": 3', "has format version 3, this program reads version 2"),
        ('"hidden_size": 24', '"hidden_size": 24, "num_experts": 8', "gives num_experts for ModelConfig"),
        ('"seed": 7', '"seed": 7, "loss_scale": 1.0', "gives loss_scale for RunState"),
    ],
)
def test_what_a_newer_program_wrote_is_refused_and_not_half_understood(checkpoint, old, new, message) -> None:
    rewrite_manifest(checkpoint, old, new)
    expect_error(checkpoint, message, "use the program that wrote it")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"entries"', '"entry"', "KeyError('entries')"),
        ('"crc32": "', '"crc32": "no', "non-hexadecimal number"),
        ('"size": [', '"size": 1, "was": [', "TypeError"),
        ('"hidden_size": 24,', '"hidden_size": 24', "JSONDecodeError"),
    ],
)
def test_a_manifest_that_was_edited_is_damage_even_where_its_checksum_was_made_right(
    checkpoint: Path, old: str, new: str, reason: str
) -> None:
    rewrite_manifest(checkpoint, old, new)
    expect_error(checkpoint, "manifest.json was edited: it has the checksum of its first line", reason)


def test_a_manifest_that_leaves_a_gap_is_refused_at_once(checkpoint: Path) -> None:
    content = json.loads((checkpoint / MANIFEST_FILE).read_text())
    piece = content["entries"]["model.final_norm.weight"]["pieces"][0]
    rewrite_manifest(checkpoint, json.dumps(piece["file"]), json.dumps(piece["file"]))  # the same bytes are accepted
    open_source(checkpoint)
    body = (checkpoint / MANIFEST_FILE).read_text().partition("\n")[2]
    start = body.index('"model.final_norm.weight"', body.index('"entries"'))
    end = body.index('"size": [', start) + len('"size": [')
    changed = body[:end] + body[end:].replace("24", "23", 1)
    rewrite_manifest(checkpoint, body, changed)
    expect_error(checkpoint, "model.final_norm.weight of iteration 10 is not stored exactly once: 1 of its 24 elements")


def test_a_manifest_with_too_few_checksums_for_a_tensor_is_damage(checkpoint: Path) -> None:
    content = json.loads((checkpoint / MANIFEST_FILE).read_text())
    key = "model.layers.0.attention.out.weight[0:24, 0:16]"
    checksums = content["files"]["rank_00000.safetensors"]["tiles"][key]["crc32"]
    rewrite_manifest(checkpoint, checksums, checksums[9:])
    expect_error(checkpoint, f"the manifest does not have a checksum for every tile of {key}: it is damaged")


def test_a_truncated_shard_is_found(checkpoint: Path) -> None:
    path = checkpoint / "rank_00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    expect_error(checkpoint, "rank_00003.safetensors has", "it was cut off")


def test_swapped_shards_are_found(checkpoint: Path) -> None:
    one, other = checkpoint / "rank_00000.safetensors", checkpoint / "rank_00001.safetensors"
    one.rename(checkpoint / "x")
    other.rename(one)
    (checkpoint / "x").rename(other)
    expect_error(checkpoint, "belongs to another checkpoint")


def test_a_shard_of_another_checkpoint_is_found(checkpoint: Path, tmp_path: Path) -> None:
    """Same names, same shapes, same header: only the checksums of the data tell them apart."""
    other = save_from_one_process(tmp_path / "other", ParallelLayout(tp=2, pp=2))
    path = other / "rank_00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-600] + bytes(600))
    shutil.copy(path, checkpoint / path.name)
    expect_error(checkpoint, "rank_00000.safetensors: the tile at rows ", "does not have the checksum")


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "rank_00000.safetensors").unlink()
    expect_error(checkpoint, "rank_00000.safetensors cannot be opened (No such file or directory)")


def test_a_folder_without_a_manifest_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_FILE).unlink()
    expect_error(checkpoint.parent, "holds no checkpoint that can be loaded: iteration 10: ", "does not exist")
    with pytest.raises(CheckpointError, match=r"--load_iters asks for iteration 10, but .* does not exist.* none"):
        open_source(checkpoint.parent, 10)
    expect_error(checkpoint, "holds no checkpoint (found: rank_00000.safetensors")
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        NativeSource(checkpoint)


def test_an_iteration_that_is_not_there_lists_those_that_are(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--load_iters asks for iteration 20, .* found 10"):
        open_source(checkpoint.parent, 20)


def test_an_iteration_asked_of_a_folder_that_has_no_choice_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--load_iters 20: .* is iteration 10; give its parent folder"):
        open_source(checkpoint, 20)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"--load_iters 20: .* is a Hugging Face model"):
        open_source(tmp_path / "hf", 20)


def test_a_folder_that_is_no_checkpoint_says_what_was_found_and_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    expect_error(tmp_path, "found: notes.txt", "manifest.json", "config.json")
    expect_error(tmp_path / "nowhere", "does not exist")
    with pytest.raises(CheckpointError, match=r"nowhere is not a folder; give one that a run saved to"):
        find_checkpoint(tmp_path / "nowhere")


def test_only_complete_iterations_are_listed(checkpoint: Path) -> None:
    (checkpoint.parent / "iter_0000020").mkdir()
    (checkpoint.parent / "iter_junk").mkdir()
    assert list_iterations(checkpoint.parent) == [10]
