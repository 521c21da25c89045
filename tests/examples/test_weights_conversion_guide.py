"""docs/guide/weights_conversion.md: every command runs on a small model and prints what the guide shows."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_folders import save_llama
from megatron.model.presets import MODEL_NAMES, model_sizes
from meta_folders import random_weights, save_meta
from tiny_tokenizers import SENTENCEPIECE_PIECES, write_sentencepiece

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "docs" / "guide" / "weights_conversion.md"
# What the commands with an output begin with.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": SENTENCEPIECE_PIECES,
}


def blocks() -> list[tuple[list[list[str]], str]]:
    """The commands of each block, split into words, and the output that follows it, empty where none does."""
    found = re.findall(r"```bash\n(.*?)```(?:\n\n```text\n(.*?)```)?", GUIDE.read_text(), re.DOTALL)
    return [([shlex.split(line) for line in block.replace("\\\n", " ").splitlines()], shown) for block, shown in found]


def load(script: str):
    spec = importlib.util.spec_from_file_location(Path(script).stem, REPOSITORY / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def untimed(output: str) -> str:
    """Without what differs from run to run, or with the version of a library that writes JSON."""
    output = re.sub(r"in \S+ s \(\S+ \S+B/s\)", "in TIME", output)
    return re.sub(r"^ *\S+B  (?=.*\.json$)|(?<=files, )\S+B", "SIZE ", output, flags=re.MULTILINE)


def test_every_command_prints_what_is_shown(tmp_path, monkeypatch, capsys):
    save_llama(tmp_path / "llama", **TINY)
    write_sentencepiece(tmp_path / "llama")
    save_meta(tmp_path / "meta", random_weights(), 2)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run = [(commands, shown) for commands, shown in blocks() if shown]
    assert len(run) >= 7
    for commands, shown in run:
        for _, script, *arguments in commands:
            load(script).main(arguments)
        assert untimed(capsys.readouterr().out) == untimed(shown)
    tokenizer = AutoTokenizer.from_pretrained("chat")
    shown_tokens, shown_ids = re.search(r"input_ids\)\n(.*?)\n.*?\n(\(.*?\))\n", GUIDE.read_text()).groups()
    ids = tokenizer("<|im_start|>a man<|im_end|>", add_special_tokens=False).input_ids
    assert str(tokenizer.convert_ids_to_tokens(ids)) == shown_tokens
    assert str((tokenizer.eos_token_id, tokenizer.pad_token_id)) == shown_ids


def test_every_command_takes_the_flags_that_are_shown():
    for commands, _ in blocks():
        for python, script, *arguments in commands:
            assert python == "python"
            load(script)._parser().parse_args(arguments)


@pytest.mark.parametrize("family", [name for name in MODEL_NAMES if model_sizes(name)])
def test_the_table_has_every_published_size(family):
    (sizes,) = re.findall(rf"^\| `{family}`[^|]* \| ([^|]*) \|", GUIDE.read_text(), re.MULTILINE)
    assert sizes == ", ".join(model_sizes(family))


def test_links_lead_somewhere():
    names = re.findall(r"`(tests/[\w/]+\.py)`", GUIDE.read_text())
    assert names and [name for name in names if not (REPOSITORY / name).exists()] == []
