"""tools/checkpoint_util.py rewrites checkpoints without changing a bit, whatever the layouts."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import legacy_trees
from hf_folders import save_llama
from megatron.checkpoint.manager import load, save
from megatron.checkpoint.native import NativeSource
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.placement import regions_of_rank, specs_of_rank
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, RunState, TokenizerIdentity
from megatron.checkpoint.tokenizer_files import identity_of
from megatron.core.layout import ParallelLayout
from megatron.core.topology import Axis
from megatron.errors import CheckpointError, MegatronError
from megatron.model.config import ModelConfig
from meta_folders import random_weights, save_meta
from other_runs import another_process_owns
from tiny_tokenizers import write_gpt2, write_huggingface

Main = Callable[[list[str]], None]
Rewrite = Callable[..., str]
SCRIPT = Path(__file__).parents[2] / "tools" / "checkpoint_util.py"
WORLD = Axis("world")
VOCAB = 1031
MODEL = ModelConfig(
    num_layers=5,
    hidden_size=32,
    num_attention_heads=8,
    num_attention_heads_kv=2,
    ffn_hidden_size=48,
    vocab_size=VOCAB,
    max_position_embeddings=64,
    use_rms_norm=True,
    glu_activation="swiglu",
    position_embedding_type="rotary",
    tie_embed_logits=False,
)
TIED = dataclasses.replace(MODEL, tie_embed_logits=True, mlp_bias=True, use_rms_norm=False, glu_activation=None)
STATE = RunState(iteration=7, consumed_samples=28, seed=3, optimizer={"step": 7}, config={"training": {"lr": 1e-3}})
VIRTUAL = "--target_num_layers_per_virtual_pipeline_stage"
WEIGHTS, OPTIMIZER = ("model",), ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")


@pytest.fixture(scope="module")
def main() -> Main:
    """The tool's main function: starting a process for each test would take longer than all of them."""
    spec = importlib.util.spec_from_file_location("checkpoint_util", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def rewrite(main: Main, capsys: pytest.CaptureFixture[str]) -> Rewrite:
    def rewrite(load_dir: Path, save_dir: Path, *flags: object, tp: int = 1, pp: int = 1) -> str:
        sizes = ("--target_tensor_parallel_size", tp, "--target_pipeline_parallel_size", pp)
        main([str(word) for word in ("--load_dir", load_dir, "--save_dir", save_dir, *sizes, *flags)])
        return capsys.readouterr().out

    return rewrite


def write_checkpoint(
    root: Path,
    model: ModelConfig = MODEL,
    *,
    kinds: tuple[str, ...] = OPTIMIZER,
    tokenizer: TokenizerIdentity | None = None,
    model_name: str | None = "llama2",
    config: dict | None = None,
) -> Path:
    """Random values for every tensor of the model, as one process saves them."""
    tensors = []
    for region in regions_of_rank(model, ParallelLayout(), 0):
        alone = dataclasses.replace(region, local_start=region.start)
        for kind in kinds:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}.{region.name}".encode()))
            tensors.append(LocalTensor(kind, [alone], torch.randn(region.size, generator=generator)))
    state = STATE if config is None else dataclasses.replace(STATE, config=config)
    return save(root, CheckpointInfo(state, model, model_name, tokenizer), tensors, WORLD)


def entries(path: Path) -> dict[str, torch.Tensor]:
    source = open_source(path)
    return {name: source.read(name, (0,) * len(source.shape(name)), source.shape(name)) for name in source.names()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_a_chain_of_layouts_gives_back_every_bit_of_weights_and_moments(
    tmp_path: Path, rewrite: Rewrite, model: ModelConfig
) -> None:
    write_checkpoint(tmp_path / "0", model)
    for number, (tp, pp) in enumerate(((2, 2), (1, 4), (8, 1), (4, 5), (1, 1))):
        rewrite(tmp_path / str(number), tmp_path / str(number + 1), tp=tp, pp=pp)
        assert len(list(tmp_path.glob(f"{number + 1}/iter_0000007/rank_*.safetensors"))) == tp * pp
    assert_same(entries(tmp_path / "5"), entries(tmp_path / "0"))
    first, last = NativeSource(tmp_path / "0" / "iter_0000007"), NativeSource(tmp_path / "5" / "iter_0000007")
    assert first.manifest.info == last.manifest.info
    assert first.manifest.files == last.manifest.files


def test_each_rank_finds_exactly_its_rectangles_in_its_own_file(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in")
    rewrite(tmp_path / "in", tmp_path / "out", tp=2, pp=2)
    layout, whole = ParallelLayout(tp=2, pp=2), entries(tmp_path / "in")
    for rank in range(4):
        stored = load_file(tmp_path / "out" / "iter_0000007" / f"rank_{rank:05d}.safetensors")
        held = [r for spec in specs_of_rank(MODEL, layout, rank) for r in spec.regions(rank % 2, 2) if r.copy == 0]
        assert len(stored) == len(OPTIMIZER) * len(held)
        for region in held:
            key = f"model.{region.name}"
            if region.size != region.global_shape:
                key += "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(region.start, region.size, strict=True)) + "]"
            assert torch.equal(stored[key], whole[f"model.{region.name}"][region.global_slices])


def test_the_command_of_the_faq_prints_what_it_did(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in", kinds=WEIGHTS)
    report = rewrite(tmp_path / "in", tmp_path / "out", "--model_type", "llama2", "--bf16", tp=2)
    assert f"reading {tmp_path / 'in' / 'iter_0000007'}: iteration 7, weights only, 48 tensors" in report
    assert f"wrote {tmp_path / 'out' / 'iter_0000007'}: 2 file(s), " in report
    assert "it holds TP2 PP1: model" in report
    expected = {name: tensor.bfloat16() for name, tensor in entries(tmp_path / "in").items()}
    assert_same(entries(tmp_path / "out"), expected)


def test_bf16_does_not_round_the_master_weights_of_an_optimizer(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in")
    report = rewrite(tmp_path / "in", tmp_path / "out", "--bf16")
    assert "--bf16: the weights stay as they are" in report
    assert_same(entries(tmp_path / "out"), entries(tmp_path / "in"))


def test_a_dry_run_says_what_each_file_will_be_and_writes_nothing(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in")
    report = rewrite(tmp_path / "in", tmp_path / "new" / "out", "--dry_run", tp=2, pp=2)
    assert not (tmp_path / "new").exists()
    announced = {name: int(size.replace(",", "")) for name, size in re.findall(r"  (rank_\S+)  ([\d,]+) bytes", report)}
    rewrite(tmp_path / "in", tmp_path / "out", tp=2, pp=2)
    written = (tmp_path / "out" / "iter_0000007").glob("rank_*")
    assert announced == {file.name: file.stat().st_size for file in written}
    assert f"4 file(s), {sum(announced.values()):,} bytes; {tmp_path} has " in report and "which is enough" in report


def test_a_dry_run_says_if_there_is_no_room(tmp_path: Path, rewrite: Rewrite, monkeypatch) -> None:
    write_checkpoint(tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert "has 10,000 bytes free, which is NOT enough" in rewrite(tmp_path / "in", tmp_path / "out", "--dry_run")


def test_virtual_stages_lie_in_the_file_of_the_rank_that_runs_them(tmp_path: Path, rewrite: Rewrite) -> None:
    """Eight layers in stages of two on two ranks: stages 0 and 2 on the first, 1 and 3 on the second."""
    write_checkpoint(tmp_path / "in", dataclasses.replace(MODEL, num_layers=8))
    report = rewrite(tmp_path / "in", tmp_path / "out", VIRTUAL, 2, pp=2)
    assert "it holds TP1 PP2 with 2 stages a rank" in report
    for rank, layers in enumerate(({0, 1, 4, 5}, {2, 3, 6, 7})):
        held = load_file(tmp_path / "out" / "iter_0000007" / f"rank_{rank:05d}.safetensors")
        assert {int(found[1]) for name in held if (found := re.search(r"layers\.(\d+)\.", name))} == layers
        assert ("model.embedding.word.weight" in held) == (rank == 0)
        assert ("model.head.weight" in held) == (rank == 1)


def test_a_source_that_does_not_say_what_it_is_gets_the_name_that_was_given(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in", kinds=WEIGHTS, model_name=None)
    rewrite(tmp_path / "in", tmp_path / "out", "--model_type", "llama3")
    assert open_source(tmp_path / "out").model_name() == "llama3"
    with pytest.raises(CheckpointError, match="holds another family: use_rms_norm is True, there False"):
        rewrite(tmp_path / "in", tmp_path / "other", "--model_type", "falcon")


@pytest.mark.parametrize("model_type", ["llama", "llama2", "falcon", "gpt", "bert", "qwen3"])
def test_every_model_of_the_faq_is_known(tmp_path: Path, rewrite: Rewrite, model_type: str) -> None:
    write_checkpoint(tmp_path / "in", kinds=WEIGHTS, model_name=model_type)
    assert "nothing was written" in rewrite(tmp_path / "in", tmp_path / "o", "--model_type", model_type, "--dry_run")


def test_a_tree_of_megatron_llm_is_written_and_read_back_with_every_bit(tmp_path: Path, rewrite: Rewrite) -> None:
    model = dataclasses.replace(MODEL, num_layers=4)
    write_checkpoint(tmp_path / "in", model, kinds=WEIGHTS)
    report = rewrite(tmp_path / "in", tmp_path / "tree", "--saver", "megatron_legacy", VIRTUAL, 1, tp=2, pp=2)
    assert "it holds TP2 PP2 with 2 stages a rank as a tree of Megatron-LLM: weights" in report
    assert "4 file(s), " in report and len(list(tmp_path.glob("tree/iter_0000007/mp_rank_*/*.pt"))) == 4
    rewrite(tmp_path / "tree", tmp_path / "out", "--loader", "megatron_legacy", "--true_vocab_size", VOCAB, tp=4)
    assert_same(entries(tmp_path / "out"), entries(tmp_path / "in"))


def test_a_hugging_face_folder_is_written_and_read_back_with_every_bit(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in", kinds=WEIGHTS, config={})
    report = rewrite(tmp_path / "in", tmp_path / "hf", "--saver", "hf")
    assert f"wrote {tmp_path / 'hf'}: 1 file(s)" in report and "it holds a Hugging Face model" in report
    rewrite(tmp_path / "hf", tmp_path / "out", "--loader", "hf", tp=2)
    assert_same(entries(tmp_path / "out"), entries(tmp_path / "in"))


def test_new_vocabulary_rows_are_the_mean_of_the_old_and_their_moments_zero(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in")
    report = rewrite(tmp_path / "in", tmp_path / "out", "--true_vocab_size", VOCAB + 300, tp=4, pp=2)
    assert f"growing the vocabulary from {VOCAB} to {VOCAB + 300} rows" in report
    before, after = entries(tmp_path / "in"), entries(tmp_path / "out")
    assert open_source(tmp_path / "out").model_config() == dataclasses.replace(MODEL, vocab_size=VOCAB + 300)
    for name in before:
        assert torch.equal(after[name][: len(before[name])], before[name])
        if name.endswith(("embedding.word.weight", "head.weight")):
            mean = before[name].double().mean(dim=0).float()
            expected = mean if name.startswith("model.") else torch.zeros_like(mean)
            torch.testing.assert_close(after[name][VOCAB:], expected.expand(300, -1), rtol=0, atol=1e-8)


def test_a_smaller_vocabulary_keeps_the_first_rows(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in", TIED)
    report = rewrite(tmp_path / "in", tmp_path / "out", "--true_vocab_size", 1000, tp=2, pp=2)
    assert "cutting the vocabulary from 1031 to 1000 rows: tokens from 1000 on are lost" in report
    before, after = entries(tmp_path / "in"), entries(tmp_path / "out")
    assert after["model.embedding.word.weight"].shape == (1000, 32)
    assert all(torch.equal(after[name], before[name][: len(after[name])]) for name in before)


def test_an_iteration_that_is_there_already_is_not_replaced(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "run")
    before = entries(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run/iter_0000007 exists, and a conversion replaces nothing; choose an"):
        rewrite(tmp_path / "run", tmp_path / "run", tp=2)
    assert len(list((tmp_path / "run" / "iter_0000007").glob("rank_*"))) == 1
    assert_same(entries(tmp_path / "run"), before)


def test_what_was_rewritten_loads_on_a_third_layout(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in")
    rewrite(tmp_path / "in", tmp_path / "out", tp=2, pp=2)
    source, whole = open_source(tmp_path / "out"), entries(tmp_path / "in")
    for rank in range(8):
        for spec in specs_of_rank(MODEL, ParallelLayout(tp=8), rank):
            local = torch.zeros(spec.local_shape(8))
            load(source, [LocalTensor("optimizer.exp_avg", spec.regions(rank, 8), local)], WORLD)
            names = {block.name: whole[f"optimizer.exp_avg.{block.name}"] for block in spec.blocks}
            assert torch.equal(local, spec.take(names, rank, 8))


def test_its_own_tokenizer_travels_with_a_checkpoint(tmp_path: Path, rewrite: Rewrite) -> None:
    tokenizer = tmp_path / "in" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.model").write_bytes(b"pieces")
    (tokenizer / "tokenizer_config.json").write_text("{}")
    identity = TokenizerIdentity("SentencePieceTokenizer", str(tokenizer / "tokenizer.model"), None)
    write_checkpoint(tmp_path / "in", tokenizer=identity)
    rewrite(tmp_path / "in", tmp_path / "out")
    copy = tmp_path / "out" / "tokenizer"
    assert {file.name for file in copy.iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    carried = open_source(tmp_path / "out").tokenizer()
    assert carried is not None and carried.tokenizer_model == str(copy / "tokenizer.model")


def test_another_tokenizer_beside_the_target_is_not_replaced(tmp_path: Path, rewrite: Rewrite) -> None:
    for name, iteration in (("in", 7), ("other", 8)):
        tokenizer = tmp_path / name / "tokenizer" / "tokenizer.model"
        tokenizer.parent.mkdir(parents=True)
        tokenizer.write_text(name)
        folder = write_checkpoint(tmp_path / name, tokenizer=identity_of(tokenizer.parent))
        folder.rename(folder.with_name(f"iter_{iteration:07d}"))
    with pytest.raises(CheckpointError, match=r"other/tokenizer holds another tokenizer \(its tokenizer\.model\)"):
        rewrite(tmp_path / "in", tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer" / "tokenizer.model").read_text() == "other"
    (tmp_path / "out").mkdir()
    with another_process_owns(tmp_path / "out"), pytest.raises(CheckpointError, match="out belongs to process 4711"):
        rewrite(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_a_failure_takes_the_copy_of_the_tokenizer_away_again(tmp_path: Path, main: Main) -> None:
    folder = save_meta(tmp_path / "meta", random_weights(), 2)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    damaged = folder / "consolidated.01.pth"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        main(["--load_dir", str(folder), "--save_dir", str(tmp_path / "out")])
    assert {file.name for file in (tmp_path / "out").iterdir()} <= {".lock"}


def test_another_file_in_the_place_of_the_tokenizer_is_found_in_the_copy_as_well(
    tmp_path: Path, rewrite: Rewrite
) -> None:
    tokenizer = tmp_path / "in" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.model").write_bytes(b"another")
    write_checkpoint(tmp_path / "in", tokenizer=TokenizerIdentity("SentencePieceTokenizer", str(tokenizer), "5a"))
    rewrite(tmp_path / "in", tmp_path / "out")
    assert open_source(tmp_path / "out").tokenizer().sha256 == "5a"


def test_a_tokenizer_travels_wherever_the_folder_of_its_run_was_moved_to(tmp_path: Path, rewrite: Rewrite) -> None:
    tokenizer = tmp_path / "run" / "tokenizer"
    tokenizer.mkdir(parents=True)
    write_gpt2(write_huggingface(tmp_path / "bpe"), tokenizer)
    write_checkpoint(tmp_path / "run", tokenizer=TokenizerIdentity("GPT2BPETokenizer", str(tokenizer), "5a"))
    (tmp_path / "run").rename(tmp_path / "moved")
    rewrite(tmp_path / "moved", tmp_path / "out")
    copy = tmp_path / "out" / "tokenizer"
    assert {file.name for file in copy.iterdir()} == {"vocab.json", "merges.txt"}
    assert open_source(tmp_path / "out").tokenizer() == TokenizerIdentity("GPT2BPETokenizer", str(copy), "5a")


@pytest.mark.parametrize("flags", [(), ("--true_vocab_size", "400")], ids=["as it is", "with another vocabulary"])
@pytest.mark.parametrize("older", [False, True], ids=["tokenizer.json", "vocab.json and merges.txt"])
def test_the_tokenizer_of_a_hugging_face_folder_travels(tmp_path: Path, main: Main, older: bool, flags) -> None:
    save_llama(tmp_path / "hf")
    bpe = write_huggingface(tmp_path / "bpe" if older else tmp_path / "hf")
    if older:
        write_gpt2(bpe, tmp_path / "hf")
    main(["--load_dir", str(tmp_path / "hf"), "--save_dir", str(tmp_path / "out"), *flags])
    kept = {file.name for file in (tmp_path / "out" / "tokenizer").iterdir()}
    assert kept == ({"vocab.json", "merges.txt"} if older else {"tokenizer.json", "tokenizer_config.json"})
    shutil.rmtree(tmp_path / "hf")
    identity = open_source(tmp_path / "out").tokenizer()
    assert (identity is None) if older else (identity.tokenizer_model == str(tmp_path / "out" / "tokenizer"))


@pytest.mark.parametrize("kind", ["meta", "tree"])
def test_the_tokenizer_beside_weights_of_another_format_travels(tmp_path: Path, main: Main, kind: str) -> None:
    if kind == "meta":
        folder = save_meta(tmp_path / "in", random_weights(), 2)
    else:
        folder = tmp_path / "in"
        legacy_trees.write_tree(
            folder, legacy_trees.LLAMA, legacy_trees.random_weights(legacy_trees.LLAMA), legacy_trees.Spelling()
        )
    (folder / "tokenizer.model").write_bytes(b"pieces")
    main(["--load_dir", str(folder), "--save_dir", str(tmp_path / "out")])
    copy = tmp_path / "out" / "tokenizer" / "tokenizer.model"
    assert copy.read_bytes() == b"pieces"
    assert open_source(tmp_path / "out").tokenizer().tokenizer_model == str(copy)


def test_a_tree_of_megatron_llms_first_versions_needs_no_permute_qkv(tmp_path: Path, main: Main) -> None:
    weights = legacy_trees.random_weights(legacy_trees.LLAMA)
    tree = tmp_path / "tree"
    legacy_trees.write_tree(tree, legacy_trees.LLAMA, weights, legacy_trees.Spelling(rotary_pairs=False))
    words = ["--load_dir", str(tree), "--save_dir", str(tmp_path / "out")]
    main([*words, "--loader", "megatron_legacy", "--rotary_halves"])
    assert_same(entries(tmp_path / "out"), {f"model.{name}": tensor for name, tensor in weights.items()})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target_tensor_parallel_size", "3"), "8 units cannot be split over"),
        (("--target_pipeline_parallel_size", "6"), "cannot fill 6 pipeline stages"),
        (("--target_tensor_parallel_size", "0"), "--target_tensor_parallel_size 0 is not a positive number"),
        (("--true_vocab_size", "-5"), "--true_vocab_size -5 is not a positive number"),
        (("--model_type", "falcon"), "holds a llama2; give --model_type llama2"),
        (("--loader", "hf"), "in is not a Hugging Face model (with config.json and safetensors files); give another"),
        (("--loader", "nemo"), "--loader nemo is not one of its choices; use auto, "),
        (("--saver", "nemo"), "--saver nemo is not one of its choices; use megatron, hf"),
        (("--saver", "hf", "--target_tensor_parallel_size", "2"), "--saver hf writes files without a layout; drop"),
        (("--num_workers", "0"), "--num_workers 0 is not a positive number"),
        ((VIRTUAL, "1"), f"{VIRTUAL} 1: one pipeline rank has no virtual stages; raise"),
        ((VIRTUAL, "0", "--target_pipeline_parallel_size", "2"), f"{VIRTUAL} 0 is not a positive number"),
        ((VIRTUAL, "2", "--target_pipeline_parallel_size", "2"), "they are not a multiple of 4; choose another size"),
        (("--max_queue_size", "50"), "--max_queue_size is not needed"),
        (("--load_iters", "8"), "found 7"),
        (("--rotary_halves",), "--rotary_halves is about trees of Megatron-LLM; give --loader megatron_legacy with it"),
    ],
)
def test_a_bad_request_says_what_to_do_and_writes_nothing(tmp_path: Path, main: Main, flags, message: str) -> None:
    write_checkpoint(tmp_path / "in")
    with pytest.raises(MegatronError, match=re.escape(message)):
        main(["--load_dir", str(tmp_path / "in"), "--save_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_an_error_before_anything_is_written(
    tmp_path: Path, rewrite: Rewrite, monkeypatch
) -> None:
    write_checkpoint(tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(CheckpointError, match=r"has 0\.000 GiB free, and a checkpoint needs 0\.001 GiB"):
        rewrite(tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_source_leaves_no_checkpoint_behind(tmp_path: Path, rewrite: Rewrite) -> None:
    path = write_checkpoint(tmp_path / "in") / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: the tile at rows 0 to "):
        rewrite(tmp_path / "in", tmp_path / "out")
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {".lock"}


def test_tensors_that_do_not_belong_to_the_model_are_not_dropped_silently(tmp_path: Path, rewrite: Rewrite) -> None:
    write_checkpoint(tmp_path / "in")
    manifest = tmp_path / "in" / "iter_0000007" / "manifest.json"
    body = manifest.read_text().replace('"tie_embed_logits": false', '"tie_embed_logits": true').partition("\n")[2]
    manifest.write_text(f'{{"crc32": "{zlib.crc32(body.encode()):08x}",\n{body}')
    with pytest.raises(CheckpointError, match=r"model\.head\.weight is no tensor of the model"):
        rewrite(tmp_path / "in", tmp_path / "out")


def test_an_error_ends_the_command_with_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--load_dir", str(tmp_path), "--save_dir", str(SCRIPT / "x")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"CheckpointError: {tmp_path} holds no checkpoint (found: nothing)")
    assert ended.stderr.count("\n") == 1
