"""A run keeps its tokenizer beside its checkpoints, under names by which it is found again."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron.checkpoint.source import RunState, Source
from megatron.checkpoint.tokenizer_source import tokenizer_of
from megatron.config import parse_run, resolve
from megatron.config.checkpoint_arguments import checkpoint_arguments
from megatron.core.topology import Axis
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.config import TokenizerConfig
from megatron.training.run import _keep_tokenizer
from tiny_tokenizers import TEXT, write_gpt2, write_huggingface


@pytest.mark.parametrize("gone", [(), ("merges",), ("vocab", "merges")], ids=str)
@pytest.mark.parametrize("merges", ["gpt2-merges.txt", "merges.txt"])
def test_the_files_of_gpt2_are_found_again_whatever_they_were_called(
    tmp_path: Path, merges: str, gone: tuple[str, ...]
) -> None:
    files = write_huggingface(tmp_path / "files")  # another tokenizer beside them does not count
    write_gpt2(files, files)
    named = {"vocab": files / "gpt2-vocab.json", "merges": files / merges}
    (files / "vocab.json").rename(named["vocab"])
    (files / "merges.txt").rename(named["merges"])
    words = [f"--vocab_file={named['vocab']}"]
    # Those beside the vocabulary need not be named.
    words.append(f"--merge_file={named['merges']}" if "gpt2" in merges else "--tokenizer_type=GPT2BPETokenizer")
    sizes = ["--num_layers=2", "--hidden_size=8", "--num_attention_heads=2", "--seq_length=8", "--lr=1e-3"]
    more = ["--model_name=llama2", "--micro_batch_size=1", "--train_iters=1", "--data_path=x", f"--save={tmp_path}/run"]
    run = resolve(parse_run([*words, *sizes, *more]), 1, tokenizer_vocab_size=301)
    tokenizer = build_tokenizer(run.tokenizer)
    identity = _keep_tokenizer(run, tokenizer, cast(Any, SimpleNamespace(world=Axis("world"))))
    assert {file.name for file in (tmp_path / "run" / "tokenizer").iterdir()} == {"vocab.json", "merges.txt"}

    for name in gone:
        named[name].unlink()
    checkpoint = cast(
        Source,
        SimpleNamespace(
            path=tmp_path / "run" / "iter_0000001",
            tokenizer=lambda: identity,
            state=lambda: RunState(iteration=1, config=run.to_dict()),
            model_config=lambda: run.model,
        ),
    )
    resumed = TokenizerConfig(**cast(Any, checkpoint_arguments(checkpoint).tokenizer))
    exported = tokenizer_of(checkpoint)
    assert exported is not None
    for found in (resumed, exported):
        again = build_tokenizer(dataclasses.replace(found))
        assert (again.name, again.encode(TEXT)) == (tokenizer.name, tokenizer.encode(TEXT))
    shutil.rmtree(files)
    assert build_tokenizer(TokenizerConfig(tokenizer_model=identity.tokenizer_model)).encode(TEXT)
