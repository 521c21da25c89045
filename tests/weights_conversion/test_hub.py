"""Conversion of a name on the hub: which files are fetched, once, and again from where a connection broke."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hf_folders import save_llama, stored_tensors
from hub_server import serve_hub
from megatron.checkpoint.opening import open_source

SCRIPT = Path(__file__).parents[2] / "weights_conversion" / "hf_to_megatron.py"


def convert(*arguments: object) -> None:
    spec = importlib.util.spec_from_file_location("hf_to_megatron", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["llama2", "--model-path=somebody/tiny", *map(str, arguments)])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with everything that repositories have beside it."""
    folder = save_llama(tmp_path_factory.mktemp("hub") / "tiny", max_shard_size="40KB")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "flax_model.msgpack", "README.md", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


def test_weights_and_texts_are_fetched_and_other_formats_are_not(repository: Path, tmp_path: Path) -> None:
    with serve_hub(repository) as hub:
        convert(f"--out={tmp_path / 'out'}", f"--cache-dir={tmp_path / 'cache'}")
    weights = {file.name for file in repository.glob("model-*.safetensors")}
    assert len(weights) > 1
    texts = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert hub.downloaded() == weights | texts
    assert len(open_source(tmp_path / "out").names()) == 30
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_what_was_fetched_before_is_not_fetched_again(repository: Path, tmp_path: Path) -> None:
    with serve_hub(repository) as hub:
        convert(f"--out={tmp_path / 'one'}", f"--cache-dir={tmp_path / 'cache'}")
        hub.requests.clear()
        convert(f"--out={tmp_path / 'two'}", f"--cache-dir={tmp_path / 'cache'}")
    assert hub.downloaded() == set()


def test_a_connection_that_broke_goes_on_where_it_was(repository: Path, tmp_path: Path) -> None:
    name = min(file.name for file in repository.glob("model-*.safetensors"))
    with serve_hub(repository) as hub:
        hub.breaks.add(name)
        convert(f"--out={tmp_path / 'out'}", f"--cache-dir={tmp_path / 'cache'}")
    starts = [first for method, file, first in hub.requests if (method, file) == ("GET", name)]
    assert len(starts) == 2 and 0 == starts[0] < starts[1]


def test_pickled_weights_are_fetched_where_there_are_no_others(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tiny")
    tensors = stored_tensors(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save({}, folder / "training_args.bin")
    with serve_hub(folder) as hub:
        convert(f"--out={tmp_path / 'out'}", f"--cache-dir={tmp_path / 'cache'}")
    assert hub.downloaded() == {"config.json", "generation_config.json", "pytorch_model.bin"}
    source = open_source(tmp_path / "out")
    assert torch.equal(source.read("model.head.weight", (0, 0), (131, 36)), tensors["lm_head.weight"])
