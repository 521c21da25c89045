"""The two conversion commands as users type them, and what they say when something is wrong."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import legacy_trees
from hf_folders import edit_json, loaded_config, save_llama, stored_tensors
from megatron.checkpoint.hf import HuggingFaceSource
from megatron.checkpoint.manager import save
from megatron.checkpoint.opening import open_source
from megatron.checkpoint.placement import logical_shapes
from megatron.checkpoint.source import CheckpointInfo, LocalTensor, RunState, TokenizerIdentity
from megatron.core.sharding import Block, ShardSpec
from megatron.core.topology import Axis
from megatron.errors import CheckpointError, ConfigError, MegatronError, TokenizerError
from megatron.model.presets import MODEL_NAMES, preset
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.config import TokenizerConfig
from meta_folders import random_weights, save_meta
from tiny_tokenizers import SENTENCEPIECE_PIECES, TEXT, write_sentencepiece

SCRIPTS = Path(__file__).parents[2] / "weights_conversion"


def load(name: str, folder: Path = SCRIPTS):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def importer():
    return load("hf_to_megatron")


@pytest.fixture(scope="module")
def exporter():
    return load("megatron_to_hf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "tiny", dtype=torch.bfloat16, max_shard_size="20KB")


@pytest.fixture
def native(llama, importer, tmp_path):
    importer.main(["llama2", f"--out={tmp_path / 'native'}", f"--model-path={llama}"])
    return tmp_path / "native"


def message_of(main, *arguments, kind: type[MegatronError] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        main([str(argument) for argument in arguments])
    return str(error.value)


def test_the_commands_of_the_docstrings_convert_there_and_back(llama, tmp_path):
    native, back = tmp_path / "native", tmp_path / "back"
    there = [SCRIPTS / "hf_to_megatron.py", "llama2", f"--out={native}", f"--cache-dir={tmp_path}"]
    run([*there, f"--model-path={llama}"])
    output = run([SCRIPTS / "megatron_to_hf.py", "--input_dir", native, "--output_dir", back])
    stored, returned = stored_tensors(llama), stored_tensors(back)
    num_kilobytes = sum(tensor.nbytes for tensor in stored.values()) / 1000
    assert output == f"wrote {back}: {len(stored)} tensors, {num_kilobytes:.1f}kB in 1 file(s)\n"
    assert loaded_config(back) == loaded_config(llama)
    assert stored.keys() == returned.keys() and all(torch.equal(stored[name], returned[name]) for name in stored)


def test_a_mistake_ends_with_one_line_and_status_2(llama, tmp_path):
    command = [sys.executable, str(SCRIPTS / "hf_to_megatron.py"), "llama2", "--ouput=x", f"--model-path={llama}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "ConfigError: --ouput is not a flag of this program; did you mean --out?\n"


def run(command) -> str:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True).stdout


def test_the_model_is_recorded(native, llama):
    source = open_source(native)
    assert source.model_name() == "llama2"
    assert source.state().iteration == 0


def test_a_local_folder_never_asks_the_network(importer, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "snapshot_download", lambda *_, **__: pytest.fail("asked for a download"))
    importer.main(["llama2", "--out", str(tmp_path / "o"), "--model_path", str(llama)])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["llama2", "--size=70", "--model-path=OpenAssistant/llama2-70b-oasst-sft-v10"], "OpenAssistant/llama2-70b"),
        (["llama2", "--size=70"], "meta-llama/Llama-2-70b-hf"),
        (["codellama", "--size", "34"], "codellama/CodeLlama-34b-hf"),
    ],
)
def test_anything_else_is_downloaded_by_its_name(importer, arguments, name, tmp_path, monkeypatch):
    asked = []

    def download(repository, **options):
        asked.append((repository, options["cache_dir"]))
        raise OSError("no network here")

    monkeypatch.setattr(importer, "snapshot_download", download)
    message = message_of(
        importer.main, *arguments, f"--out={tmp_path / 'o'}", f"--cache-dir={tmp_path}", kind=CheckpointError
    )
    ((repository, cache),) = asked
    assert repository.startswith(name) and cache == tmp_path
    assert message == (
        f"--model-path {repository} is no folder here and could not be downloaded (no network here); check the name, "
        "the network and `hf auth login`, or give the folder of a copy."
    )


def test_a_download_is_converted_like_a_folder(importer, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "snapshot_download", lambda *_, **__: str(llama))
    importer.main(["llama2", "--out", str(tmp_path / "o"), "--model-path=somebody/tiny"])
    assert open_source(tmp_path / "o").model_config().vocab_size == 131


def test_a_path_that_does_not_exist_is_not_taken_for_a_name(importer, tmp_path):
    assert message_of(
        importer.main, "llama2", f"--out={tmp_path / 'o'}", "--model-path=/no/such/folder", kind=CheckpointError
    ) == ("--model-path /no/such/folder is neither a folder nor a name on the Hugging Face hub; check the spelling.")


def test_a_size_or_a_path_is_needed(importer, tmp_path):
    assert message_of(importer.main, "llama2", "--out", tmp_path / "o") == (
        "nothing says which llama2 to convert; give --model-path, or --size with one of 7, 13, 70."
    )
    assert message_of(importer.main, "llama2", "--size=8", "--out", tmp_path / "o") == (
        "--size 8: llama2 was not published in this size; use one of 7, 13, 70."
    )


def test_a_size_is_checked_against_the_model(importer, llama, tmp_path):
    message = message_of(importer.main, "llama3", "--size=8", "--out", tmp_path / "o", "--model-path", llama)
    assert message == (
        f"{llama} is not llama3 --size 8: num_layers is 3, there 32; hidden_size is 36, there 4096; "
        "num_attention_heads is 6, there 32; num_attention_heads_kv is 2, there 8; ffn_hidden_size is 44, there 14336; "
        "kv_channels is 10, there 128. Drop --size or correct it."
    )
    assert not (tmp_path / "o").exists()


def test_a_longer_vocabulary_of_the_right_size_is_told_but_converted(importer, llama, tmp_path, monkeypatch, capsys):
    published = replace(HuggingFaceSource(llama).model_config(), vocab_size=128, rope_theta=5e5)
    monkeypatch.setattr(importer, "preset", lambda *_: published)
    importer.main(["llama2", "--size=7", f"--out={tmp_path / 'o'}", f"--model-path={llama}"])
    assert (
        f"warning: {llama} differs from the published llama2 --size 7: "
        "vocab_size is 131, there 128; rope_theta is 10000.0, there 500000.0\n"
    ) in capsys.readouterr().err


def test_another_family_than_named_is_refused(importer, llama, tmp_path):
    message = message_of(importer.main, "gpt2", "--out", tmp_path / "o", "--model-path", llama)
    assert message == (
        f"{llama} is no gpt2: use_rms_norm is True, there False; glu_activation is swiglu, there None; "
        "position_embedding_type is rotary, there absolute. Name the family that it belongs to."
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flag", ["--cache-dir", "--model-path"])
def test_metas_folder_is_converted_by_either_flag(importer, flag, tmp_path):
    weights = random_weights()
    folder = save_meta(tmp_path / "meta", weights, 2)
    write_sentencepiece(folder)
    importer.main(["llama2", f"--out={tmp_path / 'o'}", f"{flag}={folder}"])
    source = open_source(tmp_path / "o")
    assert source.model_name() == "llama2"
    for name, tensor in weights.items():
        assert torch.equal(source.read(f"model.{name}", (0,) * tensor.dim(), tensor.shape), tensor)
    tokenizer = tmp_path / "o" / "tokenizer" / "tokenizer.model"
    assert tokenizer.read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert source.tokenizer().tokenizer_model == str(tokenizer)


def test_a_model_path_counts_before_files_of_metas_in_the_cache_folder(importer, llama, tmp_path):
    cache = save_meta(tmp_path / "meta", random_weights(), 1)
    importer.main(["llama2", f"--out={tmp_path / 'o'}", f"--cache-dir={cache}", f"--model-path={llama}"])
    assert open_source(tmp_path / "o").model_config().hidden_size == 36


def test_a_size_is_checked_against_metas_files(importer, tmp_path):
    folder = save_meta(tmp_path / "meta", random_weights(), 1)
    message = message_of(importer.main, "llama2", "--size=7", "--out", tmp_path / "o", "--cache-dir", folder)
    assert message.startswith(f"{folder} is not llama2 --size 7: num_layers is ")


def test_pickled_weights_and_older_tokenizers_are_converted(importer, llama, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copyfile(llama / "config.json", folder / "config.json")
    torch.save(stored_tensors(llama), folder / "pytorch_model.bin")
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("")
    importer.main(["llama2", f"--out={tmp_path / 'o'}", f"--model-path={folder}"])
    stored = stored_tensors(llama)["lm_head.weight"]
    assert torch.equal(open_source(tmp_path / "o").read("model.head.weight", (0, 0), stored.shape), stored)
    assert sorted(file.name for file in (tmp_path / "o" / "tokenizer").iterdir()) == ["merges.txt", "vocab.json"]


def test_a_checkpoint_of_a_run_needs_no_import(importer, native, tmp_path):
    assert message_of(importer.main, "llama2", "--out", tmp_path / "o", "--model-path", native) == (
        f"{native} is a checkpoint of a run already; load it as it is, or rewrite it with tools/checkpoint_util.py."
    )


def test_models_that_cannot_be_converted_are_not_offered(importer, tmp_path):
    assert message_of(importer.main, "gpt", "--out", tmp_path / "o").startswith("model gpt is not one of its choices")


@pytest.mark.parametrize("flags", [["--dtype", "fp32"], ["--dtype=bf16"], ["--bf16"]])
def test_a_dtype_can_be_asked_for(importer, llama, flags, tmp_path):
    importer.main(["llama2", f"--out={tmp_path / 'o'}", f"--model-path={llama}", *flags])
    source = open_source(tmp_path / "o")
    expected = torch.float32 if "fp32" in flags else torch.bfloat16
    assert {source.dtype(name) for name in source.names()} == {expected}


@pytest.mark.parametrize(("flags", "num_files"), [([], 1), (["--num_output_shards", "3"], 3)])
def test_the_number_of_files_can_be_asked_for(exporter, native, flags, num_files, tmp_path):
    exporter.main(["--input_dir", str(native), "--output-dir", str(tmp_path / "hf"), *flags])
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == num_files


def test_the_size_of_files_can_be_asked_for(exporter, native, tmp_path):
    exporter.main(["--input_dir", str(native), "--output-dir", str(tmp_path / "hf"), "--max-shard-size=20KB"])
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in (tmp_path / "hf").glob("*.safetensors")]
    assert len(sizes) >= sum(sizes) / 20_000 and max(sizes) <= 20_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_output_shards=2", "--max_shard_size=1GB"], "--max_shard_size: not allowed with argument"),
        (["--max_shard_size=big"], "--max_shard_size big cannot be read: 'big' is not a size; give 5GB or 500MB, say"),
        (["--max_shard_size=0"], "--max_shard_size 0 cannot be read: '0' is not a size; give 5GB or 500MB, say"),
        (["--dtype=fp8"], "--dtype fp8 is not one of its choices"),
        (["--num_output_shards=1000"], "--num_output_shards 1000 cannot be had from 30 tensors; use 1 to 30."),
    ],
)
def test_flags_that_cannot_be_met_are_refused(exporter, native, flags, message, tmp_path):
    assert message_of(exporter.main, "--input_dir", native, "--output_dir", tmp_path / "hf", *flags).startswith(message)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("700", 700), ("3KB", 3000)]
)
def test_sizes_are_read_in_their_units(exporter, text, num_bytes):
    assert exporter._num_bytes(text) == num_bytes


def test_another_model_than_recorded_is_refused(exporter, native, tmp_path):
    arguments = ["--input_dir", native, "--output_dir", tmp_path / "hf", "--model", "codellama"]
    assert message_of(exporter.main, *arguments) == (
        f"--model codellama: {native / 'iter_0000000'} holds a llama2 model; drop --model or correct it."
    )
    exporter.main([*map(str, arguments[:-1]), "llama2"])


def test_another_family_than_is_written_is_refused_where_no_name_is_recorded(exporter, llama, tmp_path):
    for name in MODEL_NAMES:
        arguments = ["--input_dir", llama, "--output_dir", tmp_path / name, "--model", name]
        if name in ("gpt", "llama", "llama2", "llama3", "codellama"):
            exporter.main([*map(str, arguments)])
            continue
        assert message_of(exporter.main, *arguments) == (
            f"--model {name}: {llama} holds a llama model; drop --model or correct it."
        )
        assert not (tmp_path / name).exists()


def test_an_output_folder_that_holds_something_is_refused_before_anything_is_read(exporter, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    message = message_of(
        exporter.main, "--input_dir", tmp_path / "none", "--output_dir", tmp_path / "hf", kind=CheckpointError
    )
    assert message == f"{tmp_path / 'hf'} exists and is not an empty folder; choose another or remove it."


def with_tokenizer(llama, folder) -> Path:
    shutil.copytree(llama, folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).write_text(f"content of {name}")
    return folder


def test_the_tokenizer_goes_there_and_back(importer, exporter, llama, tmp_path):
    model = with_tokenizer(llama, tmp_path / "model")
    importer.main(["llama2", f"--out={tmp_path / 'native'}", f"--model-path={model}"])
    exporter.main([f"--input_dir={tmp_path / 'native'}", f"--output_dir={tmp_path / 'hf'}"])
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_text() == f"content of {name}"


def test_the_tokenizer_is_found_beside_a_checkpoint_that_was_moved(importer, exporter, llama, tmp_path):
    model = with_tokenizer(llama, tmp_path / "model")
    importer.main(["llama2", f"--out={tmp_path / 'native'}", f"--model-path={model}"])
    (tmp_path / "native").rename(tmp_path / "moved")
    exporter.main([f"--input_dir={tmp_path / 'moved' / 'iter_0000000'}", f"--output_dir={tmp_path / 'hf'}"])
    assert (tmp_path / "hf" / "tokenizer.model").exists()


@pytest.fixture
def wide(importer, tmp_path) -> Path:
    """A converted model with as many rows as the tiny SentencePiece model has ids, the five additions counted."""
    save_llama(tmp_path / "wide", vocab_size=SENTENCEPIECE_PIECES + 5)
    importer.main(["llama2", f"--out={tmp_path / 'native'}", f"--model-path={tmp_path / 'wide'}"])
    return tmp_path / "native"


def test_another_tokenizer_can_be_given(exporter, wide, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_sentencepiece(tmp_path / "other").rename(tmp_path / "my_pieces.model")
    exporter.main([f"--input_dir={wide}", f"--output_dir={tmp_path / 'hf'}", f"--vocab_file={other}"])
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == other.read_bytes()


def test_transformers_reads_a_lone_sentencepiece_file_as_we_do(exporter, wide, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    model_file = write_sentencepiece(tmp_path / "tokenizer")
    exporter.main([f"--input_dir={wide}", f"--output_dir={tmp_path / 'hf'}", f"--vocab_file={model_file}"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = build_tokenizer(TokenizerConfig(tokenizer_model=str(model_file), no_new_tokens=True))
    assert theirs(TEXT, add_special_tokens=False).input_ids == ours.encode(TEXT)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos, ours.eos, ours.vocab_size)


def test_tokens_that_were_added_for_training_are_typed_as_for_training(exporter, wide, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    model_file = write_sentencepiece(tmp_path / "tokenizer")
    added = ["--vocab_extra_ids_list", "[x],[/x]", "--vocab_extra_ids=2", "--no_new_tokens"]
    override = ["--override_special_tokens", "eos=[/x]", "pad=<unk>"]
    exporter.main(
        [f"--input_dir={wide}", f"--output_dir={tmp_path / 'hf'}", f"--vocab_file={model_file}", *added, *override]
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    names = ["<extra_id_0>", "<extra_id_1>", "[x]", "[/x]"]
    assert theirs.convert_tokens_to_ids(names) == list(range(SENTENCEPIECE_PIECES, SENTENCEPIECE_PIECES + 4))
    assert (theirs.eos_token, theirs.pad_token) == ("[/x]", "<unk>")
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.eos_token_id, config.pad_token_id) == (SENTENCEPIECE_PIECES + 3, 0)
    assert f"tokenizer: 324 ids, 4 of them added: {', '.join(names)}\n" in capsys.readouterr().out


def test_tokens_without_rows_are_named(exporter, wide, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    flags = [f"--vocab_file={write_sentencepiece(tmp_path / 'tokenizer')}", "--vocab_extra_ids_list=[x]"]
    message = message_of(
        exporter.main, f"--input_dir={wide}", f"--output_dir={tmp_path / 'hf'}", *flags, kind=TokenizerError
    )
    assert message == (
        "--vocab_extra_ids_list: token '[x]' has id 325, but the checkpoint has 325 embedding rows; add rows with "
        "tools/checkpoint_util.py --true_vocab_size 326 (321 with --no_new_tokens), or give the checkpoint's own "
        "tokenizer."
    )
    assert not (tmp_path / "hf").exists()


def test_roles_need_a_tokenizer(exporter, native, tmp_path):
    message = message_of(
        exporter.main, f"--input_dir={native}", f"--output_dir={tmp_path / 'hf'}", "--override_special_tokens", "eos=a"
    )
    assert message == (
        f"--override_special_tokens: {native / 'iter_0000000'} names no tokenizer that is still there; give it with "
        "--vocab_file."
    )


TOKENIZER_OF_A_RUN = {
    "tokenizer_type": "SentencePieceTokenizer",
    "tokenizer_model": "/gone/tokenizer.model",
    "vocab_extra_ids_list": ["<|im_start|>", "<|im_end|>"],
    "vocab_extra_ids": 1,
    "no_new_tokens": False,
}


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A checkpoint as a run leaves it, moved away from where it was written."""
    root = tmp_path / "run"
    (root / "tokenizer").mkdir(parents=True)
    write_sentencepiece(root / "tokenizer")
    save_run(root, vocab_size=SENTENCEPIECE_PIECES + 8, config={"tokenizer": TOKENIZER_OF_A_RUN})
    return root


def test_a_tree_of_megatron_llms_first_versions_needs_no_permute_qkv(exporter, tmp_path):
    weights = legacy_trees.random_weights(legacy_trees.LLAMA)
    tree = tmp_path / "tree"
    legacy_trees.write_tree(tree, legacy_trees.LLAMA, weights, legacy_trees.Spelling(rotary_pairs=False))
    exporter.main([f"--input_dir={tree}", f"--output_dir={tmp_path / 'hf'}", "--rotary_halves"])
    stored = stored_tensors(tmp_path / "hf")
    for part in "qk":
        ours = stored[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert torch.equal(ours, weights[f"layers.1.attention.{part}.weight"])


def test_both_commands_that_export_write_the_same_files(exporter, run_folder, tmp_path):
    exporter.main([f"--input_dir={run_folder}", f"--output_dir={tmp_path / 'one'}"])
    load("checkpoint_util", SCRIPTS.parent / "tools").main(
        [f"--load_dir={run_folder}", f"--save_dir={tmp_path / 'other'}", "--saver=hf"]
    )
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "other"))
    assert one == other
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"} <= one.keys()


def test_what_a_run_trained_with_is_what_its_export_has(exporter, run_folder, tmp_path):
    exporter.main([f"--input_dir={run_folder}", f"--output_dir={tmp_path / 'hf'}"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = build_tokenizer(
        TokenizerConfig(
            **{**TOKENIZER_OF_A_RUN, "tokenizer_model": str(run_folder / "tokenizer" / "tokenizer.model")},
            parse_special=True,
        )
    )
    assert list(ours.added_tokens.values()) == theirs.convert_tokens_to_ids(list(ours.added_tokens))
    text = f"{TEXT}<EOD><|im_start|> question\n<|im_end|><PAD><extra_id_0>"
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    config, generation = AutoConfig.from_pretrained(tmp_path / "hf"), GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    assert generation.eos_token_id == [ours.eos, ours.eod]


@pytest.mark.parametrize("place", ["recorded", "beside the tree", "given"])
def test_an_original_tree_is_exported_with_the_tokens_it_was_trained_with(exporter, place, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    file = write_sentencepiece(folder)
    model = replace(legacy_trees.LLAMA, vocab_size=SENTENCEPIECE_PIECES + 8)
    args = {
        "tokenizer_type": "SentencePieceTokenizer",
        "vocab_file": str(file) if place == "recorded" else "/gone/tokenizer.model",
        "vocab_extra_ids": 1,
        "vocab_extra_ids_list": "<|im_start|>,<|im_end|>",
        "new_tokens": True,
    }
    tree = tmp_path / "tree"
    spelling = legacy_trees.Spelling(padded=384, args=args)
    legacy_trees.write_tree(tree, model, legacy_trees.random_weights(model), spelling)
    if place == "beside the tree":
        shutil.copyfile(file, tree / "tokenizer.model")
    given = [f"--vocab_file={file}"] if place == "given" else []
    exporter.main([f"--input_dir={tree}", f"--output_dir={tmp_path / 'hf'}", *given])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    added = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<|im_start|>", "<|im_end|>"]
    assert theirs.convert_tokens_to_ids(added) == list(range(SENTENCEPIECE_PIECES, SENTENCEPIECE_PIECES + 8))


def test_tokens_that_were_added_survive_a_tree(exporter, run_folder, tmp_path):
    checkpoint_util = load("checkpoint_util", SCRIPTS.parent / "tools")
    checkpoint_util.main([f"--load_dir={run_folder}", f"--save_dir={tmp_path / 'tree'}", "--saver=megatron_legacy"])
    shutil.rmtree(run_folder / "tokenizer")
    for folder in (run_folder, tmp_path / "tree"):
        exporter.main([f"--input_dir={folder}", f"--output_dir={tmp_path / f'hf of {folder.name}'}"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf of tree")
    assert theirs.convert_tokens_to_ids("<|im_end|>") == SENTENCEPIECE_PIECES + 7
    assert not (tmp_path / "hf of run" / "tokenizer.json").exists()


def save_run(root: Path, *, vocab_size: int, config: dict[str, object]) -> None:
    model = preset("llama2", "7")
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_attention_heads_kv": 2}
    model = replace(model, **sizes, kv_channels=4, ffn_hidden_size=8, vocab_size=vocab_size)
    shapes = logical_shapes(model)
    tensors = [
        LocalTensor("model", ShardSpec((Block(name, shape),)).regions(0, 1), torch.randn(shape))
        for name, shape in shapes.items()
    ]
    identity = TokenizerIdentity("SentencePieceTokenizer", "/gone/tokenizer") if "tokenizer" in config else None
    info = CheckpointInfo(RunState(iteration=5, config=config), model, "llama2", identity)
    save(root, info, tensors, Axis("world"))


def test_a_folder_without_a_tokenizer_is_named(exporter, native, tmp_path):
    (tmp_path / "empty").mkdir()
    message = message_of(
        exporter.main,
        f"--input_dir={native}",
        f"--output_dir={tmp_path / 'hf'}",
        f"--vocab_file={tmp_path / 'empty'}",
        kind=CheckpointError,
    )
    assert message == (
        f"{tmp_path / 'empty'} holds no tokenizer; give a folder with tokenizer.json or tokenizer.model, or the file."
    )


def test_an_export_without_a_tokenizer_says_so(exporter, native, tmp_path, capsys):
    exporter.main([f"--input_dir={native}", f"--output_dir={tmp_path / 'hf'}"])
    assert (
        f"warning: {native / 'iter_0000000'} names no tokenizer that is still there; give one with --vocab_file to "
        "have it copied.\n"
    ) in capsys.readouterr().err


def test_an_unsupported_model_is_named_before_anything_is_written(importer, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    edit_json(model / "config.json", model_type="phi3")
    message = message_of(
        importer.main, "llama2", f"--out={tmp_path / 'o'}", f"--model-path={model}", kind=CheckpointError
    )
    assert message.startswith(f"{model / 'config.json'}: model_type 'phi3' is not supported; convert one of llama")
    assert not (tmp_path / "o").exists()
