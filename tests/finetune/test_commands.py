"""The commands of the FAQ, as they are typed there."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distributed import run_torchrun
from finetune_runs import assert_same_bits, finetune_runs, finetune_succeeds, script_main, stored_entries
from hf_folders import save_llama
from megatron.checkpoint.opening import open_source
from megatron.data.indexed import IndexedDataset
from tiny_tokenizers import SENTENCEPIECE_PIECES, TEXT, write_sentencepiece

SEQ_LENGTH = 16

# "What arguments are used to train LLaMa 2?", the whole answer but for one typo in it, `cosine 5`.
TRAIN_LLAMA_2 = """
torchrun \\
	# torchrun arguments # \\
	--nproc_per_node <GPUs per node> \\
	--nnodes <number of nodes> \\
	--node_rank <0,1,2,etc a different number per node> \\
	--master_addr <address of main node> \\
	--master_port <port> \\
	finetune.py --model_name llama2 \\
	# hardware/distributed arguments # \\
	--tensor_model_parallel_size <tp size> \\
	--pipeline_model_parallel_size <pp>  \\
	--bf16 \\
	# training arguments # \\
	--train_iters <train iters> \\
	--adam_beta1 0.9 \\
	--adam_beta2 0.95 \\
	--adam_eps 1e-5 \\
	--lr_decay_style cosine \\
	--lr_warmup_iters <warmup iters> \\
	--lr 3e-4 \\
	--min_lr 1e-6 \\
	--weight_decay 0.1 \\
	--micro_batch_size 5 \\
	--global_batch_size 1000 \\
	# additional optimization arguments # \\
	--use_flash_attn \\
	--sequence_parallel \\
	--recompute_granularity selective \\
	# logging/pathing arguments # \\
	--load <path to megatron-llama> \\
	--use_checkpoint_args \\
	--vocab_file <path to tokenizer.model provided by Meta> \\
	--log_interval 1 \\
	--data_path <path to tokenized data> \\
	--tokenizer_type SentencePieceTokenizer
"""


def filled_in(text: str, **values: object) -> list[str]:
    """The words of a command whose comment lines, which end it in a shell, are dropped."""
    text = "".join(line for line in text.replace("\\\n", "\n").splitlines(True) if not line.strip().startswith("#"))
    for placeholder, value in values.items():
        beginning = "<" + placeholder.replace("_", " ")
        assert text.count(beginning) == 1, placeholder
        start = text.index(beginning)
        text = text[:start] + shlex.quote(str(value)) + text[text.index(">", start) + 1 :]
    assert "<" not in text
    return shlex.split(text)


@pytest.fixture(scope="module")
def preprocess() -> Callable[[list[str]], None]:
    return script_main("tools/preprocess_data.py")


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [*(sentence for sentence in TEXT.split(",") for _ in range(4)), "Thus [formula]a = b[/formula] holds."]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def megatron_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """A tiny Llama whose embedding has exactly the rows of tokenizer.model, converted."""
    folder = tmp_path_factory.mktemp("llama")
    save_llama(
        folder / "hf",
        dtype=torch.bfloat16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=SENTENCEPIECE_PIECES,
        max_position_embeddings=SEQ_LENGTH,
    )
    (folder / "hf" / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    convert = script_main("weights_conversion/hf_to_megatron.py")
    convert(["llama2", f"--out={folder / 'native'}", f"--cache-dir={folder}", f"--model-path={folder / 'hf'}"])
    return folder / "native"


def tokenize(preprocess, corpus: Path, tokenizer_model: Path, prefix: Path, *flags: str) -> Path:
    tokenizer = ["--tokenizer_type", "SentencePieceTokenizer", "--vocab_file", str(tokenizer_model)]
    preprocess(["--input", str(corpus), "--output_prefix", str(prefix), *tokenizer, "--append_eod", *flags])
    (idx,) = prefix.parent.glob(f"{prefix.name}*.idx")
    return idx.with_suffix("")


def finetune_command(load: Path, data: Path, tokenizer_model: Path, *flags: str) -> list[str]:
    paths = [
        "--load",
        str(load),
        "--use_checkpoint_args",
        "--data_path",
        str(data),
        "--vocab_file",
        str(tokenizer_model),
    ]
    sizes = "--tokenizer_type SentencePieceTokenizer --model_name llama2 --micro_batch_size 2 --train_iters 2 --lr 1e-4"
    return [*paths, *sizes.split(), "--eval_iters", "0", *flags]


def test_the_command_that_trains_llama_2(megatron_llama, tokenizer_model, corpus, preprocess, tmp_path):
    data = tokenize(preprocess, corpus, tokenizer_model, tmp_path / "data", "--no_new_tokens")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torchrun, *words = filled_in(
        TRAIN_LLAMA_2,
        GPUs_per_node=4,
        number_of_nodes=1,
        **{"0,1,2": 0},
        address_of_main_node="127.0.0.1",
        port=port,
        tp_size=2,
        pp=2,
        train_iters=2,
        warmup_iters=1,
        path_to_megatron=megatron_llama,
        path_to_tokenizer=tokenizer_model,
        path_to_tokenized=data,
    )
    assert torchrun == "torchrun"
    # Evaluation is on by default; a hundred thousand samples of it would take minutes here.
    run = run_torchrun([*words, "--eval_iters", "0"], nproc=4)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("--use_flash_attn: flash-attn needs a GPU; PyTorch's scaled_dot_product_attention") == 1
    assert run.stdout.count("is used without <CLS>, <SEP>, <EOD>, <MASK> and <PAD>") == 1
    assert "4 processes = TP2 x PP2 x DP1, ZeRO 0, sequence parallel" in run.stdout
    assert "no --save: nothing of this run is kept" in run.stdout
    assert "1000 samples = 200 micro-batches of 5" in run.stdout
    assert "iteration  1/2" in run.stdout and "iteration  2/2" in run.stdout


def test_added_tokens_go_from_text_to_training(megatron_llama, tokenizer_model, corpus, preprocess, tmp_path):
    """The three places of "How to add special tokens?"; SentencePiece's own five additions come before the two."""
    added = ["--vocab_extra_ids_list", "[formula],[/formula]"]
    data = tokenize(preprocess, corpus, tokenizer_model, tmp_path / "data", *added)
    formula = SENTENCEPIECE_PIECES + 5
    assert {formula, formula + 1} < set(IndexedDataset(data).tokens.tolist())
    argv = finetune_command(megatron_llama, data, tokenizer_model, "--save", str(tmp_path / "run"), *added)

    ((refused,),) = finetune_runs(1, argv)
    assert refused.status == 2
    assert refused.err == (
        f"TokenizerError: --vocab_extra_ids_list: token '[formula]' has id {formula}, but the checkpoint has "
        f"{SENTENCEPIECE_PIECES} embedding rows; add rows with tools/checkpoint_util.py --true_vocab_size "
        f"{formula + 2} ({SENTENCEPIECE_PIECES + 2} with --no_new_tokens), or give the checkpoint's own tokenizer.\n"
    )

    reshard = script_main("tools/checkpoint_util.py")
    grown = tmp_path / "grown"
    reshard(["--load_dir", str(megatron_llama), "--save_dir", str(grown), "--true_vocab_size", str(formula + 2)])
    finetune_succeeds(1, finetune_command(grown, data, tokenizer_model, "--save", str(tmp_path / "run"), *added))
    assert open_source(tmp_path / "run").model_config().vocab_size == formula + 2

    # The run's own checkpoint brings the tokenizer, additions included, wherever it is moved.
    (tmp_path / "run").rename(tmp_path / "moved")
    sizes = "--use_checkpoint_args --micro_batch_size 2 --train_iters 3 --lr 1e-4 --eval_iters 0"
    (output,) = finetune_succeeds(1, ["--load", str(tmp_path / "moved"), "--data_path", str(data), *sizes.split()])
    assert f"vocabulary {formula + 2} tokens" in output and "iteration  3/3" in output


def test_the_five_default_additions_are_left_out_where_the_checkpoint_has_no_rows_for_them(
    megatron_llama, tokenizer_model, corpus, preprocess, tmp_path
):
    data = tokenize(preprocess, corpus, tokenizer_model, tmp_path / "data", "--no_new_tokens")
    by_arguments = finetune_command(megatron_llama, data, tokenizer_model)
    sizes = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_attention_heads_kv": 2,
        "ffn_hidden_size": 24,
        "kv_channels": 4,
        "layernorm_epsilon": 3e-6,
        "seq_length": SEQ_LENGTH,
    }
    typed = [word for word in by_arguments if word != "--use_checkpoint_args"]
    typed += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    for output in finetune_succeeds(1, by_arguments, typed):
        assert output.count(f"{tokenizer_model} is used without <CLS>, <SEP>, <EOD>, <MASK> and <PAD>") == 1
        assert f"vocabulary {SENTENCEPIECE_PIECES} tokens" in output


def test_data_with_ids_that_have_no_row_is_found_at_the_start(
    megatron_llama, tokenizer_model, corpus, preprocess, tmp_path
):
    data = tokenize(preprocess, corpus, tokenizer_model, tmp_path / "data")  # documents end with <EOD>
    ((ending,),) = finetune_runs(1, finetune_command(megatron_llama, data, tokenizer_model))
    assert ending.status == 2
    end_of_document = SENTENCEPIECE_PIECES + 2
    assert f"DataError: {data}.bin: token id {end_of_document} at position" in ending.err
    assert f"outside the vocabulary of {SENTENCEPIECE_PIECES}" in ending.err


def test_text_is_tokenized_once_with_the_tokenizer_that_fits(megatron_llama, tokenizer_model, corpus, tmp_path):
    text = tmp_path / "corpus.jsonl"
    text.write_bytes(corpus.read_bytes())
    argv = finetune_command(megatron_llama, text, tokenizer_model)
    first, second = finetune_succeeds(1, argv, argv)
    assert f"tokenizing {text} once into" in first and "tokenizing" not in second
    (idx,) = (tmp_path / "cache").glob("*.idx")
    assert IndexedDataset(idx.with_suffix("")).tokens.max() < SENTENCEPIECE_PIECES


def test_a_hugging_face_folder_is_trained_as_it_is(megatron_llama, tokenizer_model, corpus, preprocess, tmp_path):
    data = tokenize(preprocess, corpus, tokenizer_model, tmp_path / "data", "--no_new_tokens")
    native, hugging_face = tmp_path / "native", tmp_path / "hugging_face"
    by_name = finetune_command(megatron_llama, data, tokenizer_model, "--save", str(native))
    argv = finetune_command(megatron_llama.parent / "hf", data, tokenizer_model, "--save", str(hugging_face))
    position = argv.index("--vocab_file")
    own_tokenizer = argv[:position] + argv[position + 4 :]
    assert "--tokenizer_type" not in own_tokenizer
    finetune_succeeds(1, by_name, own_tokenizer)
    assert_same_bits(stored_entries(native), stored_entries(hugging_face))


def test_sequence_parallelism_on_one_tensor_rank_is_the_identity_and_said_to_be(
    megatron_llama, tokenizer_model, corpus, preprocess, tmp_path
):
    data = tokenize(preprocess, corpus, tokenizer_model, tmp_path / "data", "--no_new_tokens")
    off, on = tmp_path / "off", tmp_path / "on"
    _, output = finetune_succeeds(
        1,
        finetune_command(megatron_llama, data, tokenizer_model, "--save", str(off)),
        finetune_command(megatron_llama, data, tokenizer_model, "--save", str(on), "--sequence_parallel"),
    )
    assert "--sequence_parallel changes nothing at --tensor_model_parallel_size 1" in output
    assert_same_bits(stored_entries(off), stored_entries(on))


def test_one_process_needs_no_torchrun(megatron_llama, tokenizer_model, corpus, preprocess, tmp_path):
    data = tokenize(preprocess, corpus, tokenizer_model, tmp_path / "data", "--no_new_tokens")
    argv = finetune_command(megatron_llama, data, tokenizer_model)
    run = subprocess.run([sys.executable, "finetune.py", *argv], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "1 process = TP1 x PP1 x DP1" in run.stdout
