"""Exported tokenizers, loaded by transformers: every added token has the id it was trained with, in text too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron.checkpoint.tokenizer_export import ExportedTokenizer, export_tokenizer
from megatron.checkpoint.tokenizer_roles import override_roles, parse_overrides
from megatron.errors import CheckpointError, ConfigError, TokenizerError
from megatron.tokenizer.build import build_tokenizer
from megatron.tokenizer.config import TokenizerConfig
from tiny_tokenizers import SENTENCEPIECE_PIECES, TEXT, write_huggingface, write_sentencepiece

MANY_ROWS = 10_000
TEXTS = [TEXT, "  two blanks", "日本語 😀\n\n\ttab  ", "Ünïcödé — é", "x" * 300]


@pytest.fixture
def sentencepiece_file(tmp_path: Path) -> Path:
    (tmp_path / "sp").mkdir()
    return write_sentencepiece(tmp_path / "sp")


def export(config: TokenizerConfig, folder: Path, *overrides: str, num_rows: int = MANY_ROWS) -> ExportedTokenizer:
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    exported = export_tokenizer(config, num_rows, scratch, parse_overrides(overrides))
    for name, file in exported.files.items():
        shutil.copyfile(file, folder / name)
    return exported


def loaded(folder: Path, model_type: str = "llama") -> PreTrainedTokenizerBase:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


ADDITIONS: list[dict[str, Any]] = [
    {},
    {"no_new_tokens": True},
    {"vocab_extra_ids": 3},
    {"vocab_extra_ids_list": ("[formula],[/formula]",)},
    {"vocab_extra_ids_list": ("<|im_start|>,<|im_end|>",), "no_new_tokens": True},
    {"vocab_extra_ids": 2, "vocab_extra_ids_list": ("[x],truth,</s>",)},
]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "falcon", "gpt2", "gemma", "qwen3"])
@pytest.mark.parametrize("additions", ADDITIONS, ids=str)
def test_transformers_gives_the_ids_that_the_model_was_trained_with(
    additions: dict[str, Any], model_type: str, sentencepiece_file: Path, tmp_path: Path
) -> None:
    config = TokenizerConfig(tokenizer_model=str(sentencepiece_file), **additions)
    exported = export(config, tmp_path / "hf")
    theirs = loaded(tmp_path / "hf", model_type)
    ours = build_tokenizer(config)
    naming = build_tokenizer(TokenizerConfig(tokenizer_model=str(sentencepiece_file), parse_special=True, **additions))
    assert exported.differing_text is None
    for text in TEXTS:
        assert ids(theirs, text) == ours.encode(text)
        for token, token_id in ours.added_tokens.items():
            assert theirs.convert_tokens_to_ids(token) == token_id
            spelled = f"{text}{token} and {token}{token}\n{token}"
            assert ids(theirs, spelled) == naming.encode(spelled)
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eos)
    assert theirs.pad_token_id == (ours.pad if ours.pad != ours.eos else None)


def test_a_beginning_is_added_as_llamas_tokenizer_does_and_tokenizer_json_says_so_itself(
    sentencepiece_file: Path, tmp_path: Path
) -> None:
    export(TokenizerConfig(tokenizer_model=str(sentencepiece_file)), tmp_path / "hf")
    expected = [1, *build_tokenizer(TokenizerConfig(tokenizer_model=str(sentencepiece_file))).encode("a man")]
    assert loaded(tmp_path / "hf")("a man").input_ids == expected
    assert Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode("a man").ids == expected


def test_roles_name_the_five_tokens_that_training_adds(sentencepiece_file: Path, tmp_path: Path) -> None:
    exported = export(TokenizerConfig(tokenizer_model=str(sentencepiece_file)), tmp_path / "hf")
    theirs = loaded(tmp_path / "hf")
    roles = {theirs.cls_token: "<CLS>", theirs.sep_token: "<SEP>", theirs.mask_token: "<MASK>"}
    assert all(token == name for token, name in roles.items())
    assert (theirs.pad_token, theirs.unk_token) == ("<PAD>", "<unk>")
    end_of_document = SENTENCEPIECE_PIECES + 2
    assert exported.ids() == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": SENTENCEPIECE_PIECES + 4}
    assert exported.stop_ids() == [2, end_of_document]


def test_special_tokens_are_left_out_of_text_and_asked_for_tokens_are_not(
    sentencepiece_file: Path, tmp_path: Path
) -> None:
    config = TokenizerConfig(tokenizer_model=str(sentencepiece_file), vocab_extra_ids_list=("[x]",))
    export(config, tmp_path / "hf")
    theirs = loaded(tmp_path / "hf")
    assert theirs.decode(ids(theirs, "a man<EOD>[x]"), skip_special_tokens=True) == "a man[x]"


def test_what_was_published_beside_the_model_file_is_carried_along(sentencepiece_file: Path, tmp_path: Path) -> None:
    settings = {"chat_template": "{{ bos_token }}", "model_max_length": 77, "add_bos_token": False, "eos_token": "[/x]"}
    (sentencepiece_file.parent / "tokenizer_config.json").write_text(json.dumps(settings))
    (sentencepiece_file.parent / "chat_template.jinja").write_text("a template")
    (sentencepiece_file.parent / "added_tokens.json").write_text('{"<other>": 320}')
    config = TokenizerConfig(tokenizer_model=str(sentencepiece_file), vocab_extra_ids_list=("[x],[/x]",))
    export(config, tmp_path / "hf")
    theirs = loaded(tmp_path / "hf")
    assert (theirs.chat_template, theirs.model_max_length, theirs.eos_token) == ("a template", 77, "[/x]")
    assert theirs("a man").input_ids == ids(theirs, "a man")
    assert "<other>" not in theirs.get_vocab()


def test_a_run_on_sentencepiece_exports_sentencepiece_whatever_was_published_beside_it(
    sentencepiece_file: Path, tmp_path: Path
) -> None:
    """The conversion that transformers makes of a tokenizer.model treats a leading blank otherwise."""
    (sentencepiece_file.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    config = TokenizerConfig(tokenizer_model=str(sentencepiece_file), tokenizer_type="SentencePieceTokenizer")
    # As many rows as pieces: the model was trained without additions.
    exported = export(config, tmp_path / "hf", num_rows=SENTENCEPIECE_PIECES)
    theirs, ours = loaded(tmp_path / "hf"), exported.tokenizer
    assert ours is not None and len(theirs) == ours.vocab_size == SENTENCEPIECE_PIECES
    assert ids(theirs, " a man") == ours.encode(" a man")


@pytest.mark.parametrize("names", [("tokenizer.json",), ("tokenizer.model", "tokenizer_config.json")])
def test_published_files_are_copied_byte_for_byte(names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    for name in names:
        (tmp_path / "published" / name).write_text("{ } ")
    config = TokenizerConfig(tokenizer_model=str(tmp_path / "published"), tokenizer_type="HuggingFaceTokenizer")
    exported = export(config, tmp_path / "hf", num_rows=1)
    assert exported.tokenizer is None
    assert exported.files == {name: tmp_path / "published" / name for name in names}


def test_a_hugging_face_tokenizer_without_additions_is_copied_byte_for_byte(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "tokenizer", bos_token="<|begin|>", eos_token="<|end|>")
    exported = export(TokenizerConfig(tokenizer_model=str(folder)), tmp_path / "hf", num_rows=1)
    assert {name: file.parent for name, file in exported.files.items()} == dict.fromkeys(
        ["tokenizer.json", "tokenizer_config.json"], folder
    )
    assert exported.ids() == {"bos_token_id": 300, "eos_token_id": 301}
    assert exported.stop_ids() == []


@pytest.mark.parametrize("model_type", ["llama", "falcon", "gpt2", "qwen2", "qwen3"])
def test_tokens_are_added_to_a_hugging_face_tokenizer(model_type: str, tmp_path: Path) -> None:
    classes = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
    folder = write_huggingface(
        tmp_path / "tokenizer",
        bos_token="<|begin|>",
        eos_token={"__type": "AddedToken", "content": "<|end|>", "special": True},
        tokenizer_class=classes.get(model_type, "PreTrainedTokenizerFast"),
        chat_template="a template",
    )
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|end|>", "lstrip": false}}')
    additions: dict[str, Any] = {"vocab_extra_ids": 2, "vocab_extra_ids_list": ("[x],<|begin|>,[/x]",)}
    config = TokenizerConfig(tokenizer_model=str(folder), **additions)
    export(config, tmp_path / "hf")
    theirs = loaded(tmp_path / "hf", model_type)
    ours = build_tokenizer(TokenizerConfig(tokenizer_model=str(folder), parse_special=True, **additions))
    assert theirs.chat_template == "a template"
    for token, token_id in ours.added_tokens.items():
        assert theirs.convert_tokens_to_ids(token) == token_id
        for text in ("a man", f"a man{token} in {token}", f" {token}"):
            assert ids(theirs, text) == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (300, 301, 301)


def test_an_id_without_a_row_is_an_error(sentencepiece_file: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(tokenizer_model=str(sentencepiece_file), vocab_extra_ids_list=("[x]",))
    with pytest.raises(TokenizerError, match="but the checkpoint has 322 embedding rows"):
        export(config, tmp_path / "hf", num_rows=322)


def test_roles_can_be_given_to_other_tokens(sentencepiece_file: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(tokenizer_model=str(sentencepiece_file), vocab_extra_ids_list=("<|im_start|>,<|im_end|>",))
    overrides = ["eos=<|im_end|>", "bos=<|im_start|>", "pad=</s>", "unk=<s>", "cls=<EOD>", "sep=a", "mask=<unk>"]
    exported = export(config, tmp_path / "hf", *overrides)
    theirs = loaded(tmp_path / "hf")
    for role, _, token in (pair.partition("=") for pair in overrides):
        assert getattr(theirs, f"{role}_token") == token
    start, end = SENTENCEPIECE_PIECES + 5, SENTENCEPIECE_PIECES + 6
    assert theirs("").input_ids == [start]
    assert Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")).encode("").ids == [start]
    assert exported.overridden == {
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": 2,
        "sep_token_id": theirs.convert_tokens_to_ids("a"),
    }
    written = json.loads((tmp_path / "hf" / "special_tokens_map.json").read_text())
    assert written == {f"{role}_token": token for role, token in (pair.split("=") for pair in overrides)}


def test_roles_of_a_published_tokenizer_can_be_given_to_other_tokens(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "tokenizer", bos_token="<|begin|>", eos_token="<|end|>", model_max_length=9)
    description = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [300], "tokens": ["<|begin|>"]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    description["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    (folder / "tokenizer.json").write_text(json.dumps(description))
    exported = export(TokenizerConfig(tokenizer_model=str(folder)), tmp_path / "hf", "bos=<|end|>")
    theirs = loaded(tmp_path / "hf")
    assert (theirs("").input_ids, theirs.bos_token, theirs.model_max_length) == ([301], "<|end|>", 9)
    assert exported.ids() == {"bos_token_id": 301, "eos_token_id": 301}


BOS_EOS = {"bos_token": "</s>", "eos_token": "</s>"}
END = "<|im_end|>"


@pytest.mark.parametrize(
    ("single", "pair", "roles", "overrides", "expected"),
    [
        ("$A </s>", "$A </s> $B </s>", {"eos_token": "</s>", "pad_token": "</s>"}, {"pad": "<PAD>"}, ["a </s>"]),
        ("</s> $A", "</s> $A </s> $B", BOS_EOS, {"eos": END}, ["</s> a", "</s> a </s> b"]),
        ("</s> $A", "</s> $A </s> $B", BOS_EOS, {"bos": END}, [f"{END} a", f"{END} a {END} b"]),
        ("</s> $A </s>", "</s> $A $B </s>", BOS_EOS, {"eos": END}, [f"</s> a {END}", f"</s> a b {END}"]),
        ("$A </s>", "$A </s> $B </s>", BOS_EOS, {"eos": END, "unk": "</s>"}, [f"a {END}", f"a {END} b {END}"]),
        ("</s> $A <PAD>", "$A <PAD> $B", {**BOS_EOS, "sep_token": "<PAD>"}, {"bos": "<PAD>", "sep": "</s>"},
         ["<PAD> a </s>", "a </s> b"]),
        # Nobody is its role there; a token that a template puts before a text may be called eos alone.
        ("</s> $A", "</s> $A $B", {"eos_token": "</s>"}, {"eos": END}, [f"{END} a", f"{END} a b"]),
    ],
)  # fmt: skip
def test_a_template_follows_the_role_and_not_the_text_of_a_token(
    single: str, pair: str, roles: dict[str, str], overrides: dict[str, str], expected: list[str]
) -> None:
    model, settings, _ = override_roles(with_template(single, pair), roles, overrides)
    texts = [model.encode("a").tokens, model.encode("a", "b").tokens]
    assert [" ".join(tokens) for tokens in texts][: len(expected)] == expected
    assert settings == {**roles, **{f"{role}_token": token for role, token in overrides.items()}}


@pytest.mark.parametrize(
    ("single", "pair", "place", "roles"),
    [
        ("$A </s>", "$A </s> $B </s>", "after a text", ["eos", "sep"]),
        ("</s> $A </s>", "</s> $A </s> $B </s>", "between texts", ["bos", "eos"]),
    ],
)
def test_a_template_that_leaves_open_which_role_it_means_is_refused(
    single: str, pair: str, place: str, roles: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        override_roles(with_template(single, pair), {f"{role}_token": "</s>" for role in roles}, {"eos": END})
    first, second = roles
    assert str(error.value) == (
        f"--override_special_tokens: {first} and {second} share the token '</s>', which the tokenizer's template puts "
        f"{place} without saying which it means; give them one token, such as {first}='{END}' {second}='{END}'."
    )


def with_template(single: str, pair: str) -> Tokenizer:
    vocabulary = {"<unk>": 0, "</s>": 1, "<PAD>": 2, "a": 3, END: 4, "b": 5}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.add_special_tokens(["</s>", "<PAD>", END])
    special = [("</s>", 1), ("<PAD>", 2)]
    model.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return model


def test_a_token_that_does_not_exist_cannot_have_a_role(sentencepiece_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        export(TokenizerConfig(tokenizer_model=str(sentencepiece_file)), tmp_path / "hf", "eos=<|im_end|>")
    assert str(error.value) == (
        "--override_special_tokens eos=<|im_end|>: the tokenizer has no token '<|im_end|>'; name one that it has, or "
        "train with it in --vocab_extra_ids_list."
    )


@pytest.mark.parametrize("pair", ["eos", "eos=", "end=</s>", "=</s>"])
def test_what_is_no_role_and_token_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_overrides([pair])
    assert str(error.value) == (
        f"--override_special_tokens {pair}: give role=token, with a role of bos, cls, eos, mask, pad, sep, unk; "
        'eos="<|im_end|>", say.'
    )


def test_a_role_has_one_token_and_the_token_may_have_an_equals_sign() -> None:
    assert parse_overrides(["eos==", "pad=a=b"]) == {"eos": "=", "pad": "a=b"}
    with pytest.raises(ConfigError) as error:
        parse_overrides(["eos=a", "eos=b"])
    assert str(error.value) == "--override_special_tokens names eos more than once; give every role one token."


def test_a_tokenizer_of_vocabulary_files_is_copied_but_keeps_its_roles(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "old" / name).write_text("{}")
    config = TokenizerConfig(tokenizer_model=str(tmp_path / "old"), tokenizer_type="HuggingFaceTokenizer")
    exported = export(config, tmp_path / "hf")
    assert exported.files.keys() == {"vocab.json", "merges.txt"}
    assert exported.ids() == {}
    with pytest.raises(TokenizerError) as error:
        export(config, tmp_path / "other", "eos=a")
    assert str(error.value) == (
        "--override_special_tokens needs a tokenizer.json or tokenizer.model, and the tokenizer has vocab.json, "
        "merges.txt; save it with transformers, which writes tokenizer.json."
    )


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer; give a folder with tokenizer.json"):
        export(TokenizerConfig(tokenizer_model=str(tmp_path)), tmp_path / "hf")


@pytest.mark.parametrize("additions", [{}, {"vocab_extra_ids_list": ("[x],[/x]",)}], ids=str)
@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "BertWordPieceLowerCase"])
def test_tokenizers_of_other_files_get_a_tokenizer_json(kind: str, additions: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    if kind == "GPT2BPETokenizer":
        hugging_face = write_huggingface(tmp_path / "hugging_face")
        model = json.loads((hugging_face / "tokenizer.json").read_text())["model"]
        vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
        (tmp_path / "old" / "vocab.json").write_text(json.dumps(vocabulary))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (tmp_path / "old" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    else:
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "##kind", "truth", ".", "##s"]
        (tmp_path / "old" / "vocab.txt").write_text("\n".join(pieces))
    config = TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(tmp_path / "old"), **additions)
    exported = export(config, tmp_path / "hf")
    ours, theirs = build_tokenizer(config), loaded(tmp_path / "hf", "bert" if "Bert" in kind else "gpt2")
    text = "A mankind truths. [x]a man[/x]" if additions else "A mankind truths. \n a man"
    assert ids(theirs, text) == ours.encode(text)
    assert theirs.convert_tokens_to_ids(list(ours.added_tokens)) == list(ours.added_tokens.values())
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos, ours.pad)
    assert "tokenizer.json" in exported.files
