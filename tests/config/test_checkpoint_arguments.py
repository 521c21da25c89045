"""What is taken over from a checkpoint, and what is left to the run."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megatron.checkpoint.manifest import Manifest, read_manifest, write_manifest
from megatron.checkpoint.source import CheckpointInfo, RunState, TokenizerIdentity
from megatron.config import CheckpointArguments, checkpoint_arguments, parse_run, resolve
from megatron.model.config import ModelConfig, RopeScaling

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_position_embeddings=64)


@dataclass
class Folder:
    """As much of a checkpoint as is read here."""

    run_state: RunState | None = None
    identity: TokenizerIdentity | None = None
    path: Path = Path("/run/iter_0000003")
    model: ModelConfig = MODEL

    def model_config(self) -> ModelConfig:
        return self.model

    def tokenizer(self) -> TokenizerIdentity | None:
        return self.identity

    def state(self) -> RunState | None:
        return self.run_state


def test_a_folder_of_weights_gives_architecture_and_tokenizer_and_leaves_the_length_to_the_model():
    found = checkpoint_arguments(Folder(identity=TokenizerIdentity("HuggingFaceTokenizer", "/hf")))
    assert found == CheckpointArguments(
        MODEL, None, {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/hf"}
    )
    assert checkpoint_arguments(Folder()) == CheckpointArguments(MODEL)


@pytest.mark.parametrize("identity", [None, TokenizerIdentity("SentencePieceTokenizer", "/moved.model")])
def test_a_checkpoint_of_a_run_gives_the_length_and_every_tokenizer_flag_of_that_run(identity):
    flags = ["--load=/c", "--use_checkpoint_args", "--micro_batch_size=1", "--train_iters=9", "--lr=1", "--data_path=d"]
    first = resolve(
        parse_run([*flags, "--seq_length=16", "--tokenizer_model=/t.model", "--vocab_extra_ids_list=[a],[b]"]),
        1,
        checkpoint=CheckpointArguments(MODEL),
    )
    stored = checkpoint_arguments(Folder(RunState(iteration=3, config=first.to_dict()), identity))
    second = resolve(parse_run(flags), 1, checkpoint=stored)
    assert (second.model, second.data, second.tokenizer) == (first.model, first.data, first.tokenizer)


def test_the_tokenizer_beside_a_checkpoint_is_found_where_the_recorded_one_is_gone(tmp_path):
    beside, elsewhere = tmp_path / "tokenizer", tmp_path / "elsewhere"
    beside.mkdir()
    for recorded, expected in ((elsewhere, beside), (tmp_path, tmp_path)):
        identity = TokenizerIdentity("HuggingFaceTokenizer", str(recorded))
        found = checkpoint_arguments(Folder(identity=identity, path=tmp_path / "iter_0000003"))
        assert found.tokenizer["tokenizer_model"] == str(expected)


# A field of the architecture by its name: another value, with what else it needs.
OTHER_VALUES: dict[str, dict[str, object]] = {
    "num_layers": {"num_layers": 7},
    "hidden_size": {"hidden_size": 48},
    "num_attention_heads": {"num_attention_heads": 2, "num_attention_heads_kv": 2, "kv_channels": 16},
    "num_attention_heads_kv": {"num_attention_heads_kv": 2},
    "parallel_layernorm": {"parallel_attn": True, "parallel_layernorm": True},
    "rope_scaling": {"position_embedding_type": "rotary", "rope_scaling": RopeScaling("llama3", 8.0, 2.0, 3.0, 512)},
}


def other_value(field: dataclasses.Field) -> dict[str, object]:
    """Another value of a field than MODEL has, found by its type where the table has none."""
    if field.name in OTHER_VALUES:
        return OTHER_VALUES[field.name]
    present, annotation = getattr(MODEL, field.name), get_type_hints(ModelConfig)[field.name]
    choices = [choice for part in (annotation, *get_args(annotation)) for choice in get_args(part)]
    words = [choice for choice in choices if isinstance(choice, str) and choice != present]
    if words:
        return {field.name: words[-1]}
    if isinstance(present, bool):
        return {field.name: not present}
    return {field.name: (present or 1) * 2}


@pytest.mark.parametrize("field", dataclasses.fields(ModelConfig), ids=lambda field: field.name)
def test_every_field_of_the_architecture_comes_back_from_a_checkpoint(field, tmp_path):
    """Written into a manifest, read again, taken over by a command line that says nothing of it."""
    model = dataclasses.replace(MODEL, **other_value(field))
    assert getattr(model, field.name) != getattr(MODEL, field.name)
    write_manifest(tmp_path, Manifest({}, {}, CheckpointInfo(RunState(iteration=3), model)))
    stored = checkpoint_arguments(Folder(path=tmp_path, model=read_manifest(tmp_path).info.model))
    flags = ["--load=/c", "--use_checkpoint_args", "--micro_batch_size=1", "--train_iters=9", "--lr=1", "--data_path=d"]
    assert resolve(parse_run(flags), 1, checkpoint=stored).model == model
