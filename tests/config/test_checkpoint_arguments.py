"""What is taken over from a checkpoint, and what is left to the run."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.checkpoint.source import RunState, TokenizerIdentity
from megatron.config import CheckpointArguments, checkpoint_arguments, parse_run, resolve
from megatron.model.config import ModelConfig

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=50, max_position_embeddings=64)


@dataclass
class Folder:
    """As much of a checkpoint as is read here."""

    run_state: RunState | None = None
    identity: TokenizerIdentity | None = None
    path: Path = Path("/run/iter_0000003")

    def model_config(self) -> ModelConfig:
        return MODEL

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
