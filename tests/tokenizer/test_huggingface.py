from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron.errors import TokenizerError
from megatron.tokenizer.huggingface import FalconTokenizer, HuggingFaceTokenizer
from tiny_tokenizers import TEXT, write_huggingface

BEGIN, END = 300, 301


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("huggingface"), bos_token="<|begin|>", eos_token="<|end|>")


@pytest.fixture(scope="module")
def raw(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def _change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_ids_are_those_of_the_library(folder, raw):
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.encode(TEXT) == raw.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_ids_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert HuggingFaceTokenizer(folder).encode(TEXT) == reference(TEXT, add_special_tokens=False)["input_ids"]


def test_a_folder_and_its_tokenizer_json_are_the_same_tokenizer(folder):
    assert HuggingFaceTokenizer(folder / "tokenizer.json").identity == HuggingFaceTokenizer(folder).identity


def test_special_tokens_come_from_the_tokenizer_config(folder):
    tokenizer = HuggingFaceTokenizer(folder)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (BEGIN, END, END, None)
    assert tokenizer.vocab_size == 302


def test_special_tokens_may_be_objects(tmp_path):
    write_huggingface(tmp_path, eos_token={"content": "<|end|>", "lstrip": False})
    assert HuggingFaceTokenizer(tmp_path).eos == END


def test_special_tokens_map_is_read_after_the_tokenizer_config(tmp_path):
    write_huggingface(tmp_path, eos_token="<|end|>")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|begin|>", "pad_token": "<|begin|>"}')
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert (tokenizer.eos, tokenizer.pad) == (END, BEGIN)


def test_ids_of_the_generation_config_are_read_last_and_the_first_of_several_counts(tmp_path):
    write_huggingface(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 300, "eos_token_id": [301, 300]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "pad_token_id": 9}')
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (BEGIN, END, 9)


def test_without_any_of_these_files_there_are_no_special_tokens(tmp_path):
    write_huggingface(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.bos is tokenizer.eos is tokenizer.pad is tokenizer.eod is None


def test_the_vocabulary_counts_to_the_largest_id_where_ids_have_holes(tmp_path):
    write_huggingface(tmp_path)
    file = tmp_path / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    model["vocab"][last] = 400
    _change(file, model=model)
    assert HuggingFaceTokenizer(tmp_path).vocab_size == 401


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path, raw):
    write_huggingface(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.enable_truncation(5)
    model.enable_padding(length=7)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == raw.encode(TEXT).ids
    assert [len(ids) for ids in tokenizer.encode_batch(["a", "a a a a a a a a a a"])] == [
        1,
        len(raw.encode("a" + " a" * 9)),
    ]


def test_a_template_of_the_file_adds_no_tokens(tmp_path, raw):
    write_huggingface(tmp_path)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 300)]
    )
    model.save(str(tmp_path / "tokenizer.json"))
    assert HuggingFaceTokenizer(tmp_path).encode("a") == raw.encode("a").ids
    assert HuggingFaceTokenizer(tmp_path).encode_batch(["a"])[0].tolist() == raw.encode("a").ids


def test_special_tokens_that_a_text_spells_out_stay_text(folder):
    tokenizer = HuggingFaceTokenizer(folder, vocab_extra_ids=1)
    text = "a <|end|> b <extra_id_0>"
    for ids in (tokenizer.encode(text), tokenizer.encode_batch([text])[0].tolist()):
        assert max(ids) < BEGIN
        assert tokenizer.decode(ids) == text


def test_parse_special_turns_spelled_out_special_tokens_into_their_ids(folder, raw):
    assert HuggingFaceTokenizer(folder, parse_special=True).encode("a<|end|>b") == raw.encode("a<|end|>b").ids
    assert END in raw.encode("a<|end|>b").ids


def test_tokens_of_the_list_come_after_all_others_and_are_matched(folder, raw):
    tokenizer = HuggingFaceTokenizer(folder, vocab_extra_ids=1, extra_tokens=["[formula]", "[/formula]"])
    assert tokenizer.added_tokens == {"<extra_id_0>": 302, "[formula]": 303, "[/formula]": 304}
    assert tokenizer.vocab_size == 305
    expected = [*raw.encode("so").ids, 303, *raw.encode("x").ids, 304]
    assert tokenizer.encode("so[formula]x[/formula]") == expected
    assert tokenizer.decode(expected) == "so[formula]x[/formula]"


def test_a_special_token_of_the_file_is_matched_when_the_list_names_it(folder):
    tokenizer = HuggingFaceTokenizer(folder, extra_tokens=["<|begin|>"])
    ids = tokenizer.encode("<|begin|>a<|end|>")
    assert ids[0] == BEGIN and END not in ids
    assert tokenizer.vocab_size == 302


def test_a_batch_equals_its_texts_for_any_number_of_threads(folder):
    tokenizer = HuggingFaceTokenizer(folder)
    texts = [TEXT[:n] for n in range(40)]
    for num_threads in (1, 2, 5):
        batch = tokenizer.encode_batch(texts, num_threads)
        assert all(ids.dtype == np.int32 for ids in batch)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]


def test_the_identity_changes_with_everything_that_changes_ids(folder, tmp_path):
    write_huggingface(tmp_path, bos_token="<|begin|>")
    variants = [
        HuggingFaceTokenizer(folder),
        HuggingFaceTokenizer(folder, extra_tokens=["a"]),
        HuggingFaceTokenizer(folder, parse_special=True),
        HuggingFaceTokenizer(tmp_path),
    ]
    assert len({tokenizer.identity.fingerprint for tokenizer in variants}) == len(variants)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer\.json: No such file.*--tokenizer_model"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00", b"[1, 2"])
@pytest.mark.parametrize("extra_tokens", [(), ("[f]",)])
def test_a_file_of_another_kind_is_refused(tmp_path, content, extra_tokens):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer\.json .*SentencePieceTokenizer"):
        HuggingFaceTokenizer(tmp_path, extra_tokens=extra_tokens)


def test_a_special_token_that_the_tokenizer_lacks_is_named(tmp_path):
    write_huggingface(tmp_path, eos_token="<|other|>")
    with pytest.raises(TokenizerError, match=r"eos_token '<\|other\|>' of .*tokenizer_config.json is not in tokenizer"):
        HuggingFaceTokenizer(tmp_path)


def test_a_broken_tokenizer_config_is_named(tmp_path):
    write_huggingface(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not JSON"):
        HuggingFaceTokenizer(tmp_path)


def test_an_id_outside_the_vocabulary_is_not_decoded(folder):
    with pytest.raises(TokenizerError, match="id -1 is outside the 302 ids of the HuggingFaceTokenizer"):
        HuggingFaceTokenizer(folder).decode([-1])


def test_falcon_ends_documents_with_its_own_token_also_without_files_beside(tmp_path, folder):
    write_huggingface(tmp_path, special=("<|begin|>", "<|endoftext|>"))
    (tmp_path / "tokenizer_config.json").unlink()
    falcon = FalconTokenizer(tmp_path / "tokenizer.json")
    assert (falcon.name, falcon.eos, falcon.eod) == ("FalconTokenizer", 301, 301)
    assert HuggingFaceTokenizer(tmp_path).eod is None
    assert FalconTokenizer(folder).eod == END  # what the files beside name comes first
