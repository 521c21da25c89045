"""The hash of a tokenizer that a checkpoint records: another in its place is found, by `verify` and on resuming."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import finetune
from checkpoint_samples import INFO, save_from_one_process
from megatron.checkpoint.source import RunState, Source, TokenizerIdentity
from megatron.checkpoint.tokenizer_files import identity_of
from megatron.checkpoint.tokenizer_source import check_tokenizer
from megatron.checkpoint.verify import verify_iteration
from megatron.core.layout import ParallelLayout
from megatron.errors import CheckpointError
from megatron.tokenizer import Tokenizer, TokenizerConfig, build_tokenizer
from tiny_tokenizers import write_gpt2, write_huggingface, write_ranks, write_sentencepiece, write_wordpiece


def write_gpt2_alone(folder: Path) -> object:
    return write_gpt2(write_huggingface(folder.parent / "other"), folder)


def write_ranks_alone(folder: Path) -> object:
    return write_ranks(write_huggingface(folder.parent / "other"), folder)


def write_wordpiece_alone(folder: Path) -> object:
    return write_wordpiece(folder, folder)


def write_both_kinds(folder: Path) -> object:
    """As published models have them: the run is on the tokenizer.model, and a tokenizer.json lies beside it."""
    return write_sentencepiece(write_huggingface(folder))


def swap_last_lines(file: Path) -> None:
    *lines, one, other = file.read_text().splitlines()
    file.write_text("\n".join([*lines, other, one, ""]))


def swap_two_ids(file: Path) -> None:
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps({**vocabulary, "a": vocabulary["b"], "b": vocabulary["a"]}))


def swap_case(file: Path) -> None:
    """Pieces of the same lengths, so that the file can still be loaded."""
    file.write_bytes(file.read_bytes().replace(b"ed", b"eD", 1))


def put_a_space(file: Path) -> None:
    file.write_text(file.read_text() + " ")


KINDS: dict[str, tuple[str, Callable[[Path], object], str, Callable[[Path], None]]] = {
    "sentencepiece": ("SentencePieceTokenizer", write_both_kinds, "tokenizer.model", swap_case),
    "huggingface": ("HuggingFaceTokenizer", write_huggingface, "tokenizer.json", put_a_space),
    "falcon": ("FalconTokenizer", write_huggingface, "tokenizer.json", put_a_space),
    "gpt2 vocabulary": ("GPT2BPETokenizer", write_gpt2_alone, "vocab.json", swap_two_ids),
    "gpt2 merges": ("GPT2BPETokenizer", write_gpt2_alone, "merges.txt", swap_last_lines),
    "bert lowercase": ("BertWordPieceLowerCase", write_wordpiece_alone, "vocab.txt", swap_last_lines),
    "bert": ("BertWordPieceCase", write_wordpiece_alone, "vocab.txt", swap_last_lines),
    "ranks": ("TikTokenizer", write_ranks_alone, "tokenizer.model", swap_last_lines),
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """A tokenizer beside a checkpoint: `damage` makes another of it that can still be loaded."""

    config: TokenizerConfig
    main: Path
    tokenizer: Tokenizer
    damage: Callable[[], None]

    @property
    def folder(self) -> Path:
        return self.main.parent

    def identity(self) -> TokenizerIdentity:
        return TokenizerIdentity(self.tokenizer.name, str(self.folder), self.tokenizer.identity.file_sha256)

    def state(self) -> RunState:
        section = dataclasses.asdict(self.config)
        return dataclasses.replace(INFO.state, config={"tokenizer": {**section, "vocab_extra_ids_list": []}})

    def source(self) -> Source:
        found = SimpleNamespace(
            path=self.folder.parent / "iter_0000010",
            tokenizer=self.identity,
            state=self.state,
            model_config=lambda: dataclasses.replace(INFO.model, vocab_size=self.tokenizer.vocab_size),
        )
        return cast(Source, found)


def keep(root: Path, kind: str) -> Kept:
    name, write, main, change = KINDS[kind]
    folder = root / "tokenizer"
    folder.mkdir(parents=True)
    write(folder)
    config = TokenizerConfig(name, str(folder), tiktoken_encoding="gpt2" if name == "TikTokenizer" else None)
    return Kept(config, folder / main, build_tokenizer(config), lambda: change(folder / main))


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_another_tokenizer_of_every_type_beside_the_checkpoint(tmp_path: Path, kind: str) -> None:
    kept = keep(tmp_path, kind)
    info = dataclasses.replace(INFO, state=kept.state(), tokenizer=kept.identity())
    folder = save_from_one_process(tmp_path, ParallelLayout(), info=info)
    assert verify_iteration(folder, on_bytes=lambda _: None).damage == ()
    kept.damage()
    (message,) = verify_iteration(folder, on_bytes=lambda _: None).damage
    assert message.startswith(f"{kept.folder} is not the tokenizer of iter_0000010: its SHA-256 is ")
    assert message.endswith("Restore its files, or load with the right one as --tokenizer_model.")
    kept.main.unlink()
    (message,) = verify_iteration(folder, on_bytes=lambda _: None).damage
    assert message.startswith(f"{kept.folder} cannot be loaded as the {kept.tokenizer.name} of iter_0000010: ")
    assert str(kept.main) in message


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_beside_a_checkpoint_must_be_the_recorded_one_even_if_the_user_names_it(tmp_path, kind) -> None:
    kept = keep(tmp_path, kind)
    check_tokenizer(kept.source(), kept.tokenizer, str(kept.folder), is_named=False)
    kept.damage()
    now = build_tokenizer(kept.config)
    for path, is_named in ((kept.folder, False), (kept.folder, True), (kept.main, True)):
        with pytest.raises(CheckpointError, match="is not the tokenizer of .*iter_0000010: its SHA-256 is .* Restore "):
            check_tokenizer(kept.source(), now, str(path), is_named=is_named)


def test_the_file_that_a_run_named_must_still_be_the_same(tmp_path) -> None:
    kept, other = keep(tmp_path / "run", "bert"), keep(tmp_path / "elsewhere", "bert")
    other.damage()
    with pytest.raises(CheckpointError, match="or name the right tokenizer with --tokenizer_model"):
        check_tokenizer(kept.source(), build_tokenizer(other.config), other.config.path, is_named=False)


def test_another_tokenizer_that_the_user_names_is_taken_with_one_warning(tmp_path, caplog) -> None:
    kept, other = keep(tmp_path / "run", "bert"), keep(tmp_path / "elsewhere", "bert")
    with caplog.at_level(logging.WARNING):
        check_tokenizer(kept.source(), other.tokenizer, other.config.path, is_named=True)
        assert not caplog.records
        other.damage()
        check_tokenizer(kept.source(), build_tokenizer(other.config), other.config.path, is_named=True)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{other.folder} is not the tokenizer of {kept.source().path}: ")


def test_the_other_kind_of_file_of_weights_that_were_only_converted_is_taken_silently(tmp_path, caplog) -> None:
    kept, other = keep(tmp_path / "run", "huggingface"), keep(tmp_path / "published", "sentencepiece")
    source = SimpleNamespace(**{**vars(kept.source()), "state": lambda: RunState(iteration=0)})
    check_tokenizer(cast(Source, source), other.tokenizer, str(other.main), is_named=True)
    assert not caplog.records


def test_what_was_recorded_of_ranks_without_their_encoding_counts_as_the_same(tmp_path) -> None:
    kept = keep(tmp_path, "ranks")
    identity = identity_of(kept.folder)
    assert identity is not None and identity.sha256 != kept.identity().sha256
    source = cast(Source, SimpleNamespace(**{**vars(kept.source()), "tokenizer": lambda: identity}))
    for path in (kept.folder, kept.main):
        check_tokenizer(source, kept.tokenizer, str(path), is_named=False)


def test_without_a_recorded_hash_nothing_is_compared(tmp_path) -> None:
    kept = keep(tmp_path, "bert")
    for identity in (None, TokenizerIdentity("BertWordPieceCase", str(kept.folder))):
        source = cast(Source, SimpleNamespace(**{**vars(kept.source()), "tokenizer": lambda held=identity: held}))
        check_tokenizer(source, kept.tokenizer, str(kept.folder), is_named=False)


def test_a_resumed_run_stops_at_another_tokenizer_before_its_processes_meet(tmp_path, monkeypatch) -> None:
    kept, other = keep(tmp_path / "run", "gpt2 vocabulary"), keep(tmp_path / "elsewhere", "gpt2 vocabulary")
    used: list[str | None] = []
    monkeypatch.setattr(finetune, "open_load", lambda typed: kept.source())
    monkeypatch.setattr(finetune, "configure_logging", lambda launch: None)
    monkeypatch.setattr(finetune, "train", lambda run, tokenizer, source: used.append(run.tokenizer.path))
    flags = ["--load=run", "--use_checkpoint_args", "--micro_batch_size=1", "--train_iters=9", "--lr=1"]
    flags += ["--data_path=d", "--seq_length=16"]
    finetune.main(flags)
    kept.damage()
    with pytest.raises(CheckpointError, match="is not the tokenizer of"):
        finetune.main(flags)
    finetune.main([*flags, f"--tokenizer_model={other.folder}"])
    other.damage()
    finetune.main([*flags, f"--vocab_file={other.folder}"])
    assert used == [str(kept.folder), str(other.folder), str(other.folder)]
