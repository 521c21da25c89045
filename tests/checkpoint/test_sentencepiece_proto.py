"""Reading a tokenizer.model's protocol buffer, compared with the classes that the compiler of the schema made."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron.checkpoint.sentencepiece_proto import ModelType, read_sentencepiece
from megatron.errors import TokenizerError
from tiny_tokenizers import TEXT


def trained(**options: object) -> bytes:
    model = io.BytesIO()
    defaults = {"vocab_size": 60, "model_type": "bpe", "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, **{**defaults, **options}
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "unigram", "normalization_rule_name": "identity"},
        {"vocab_size": 320, "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"vocab_size": 70, "user_defined_symbols": ["[x]", "é"], "control_symbols": ["<c>"], "pad_id": 3},
        {"model_type": "char", "treat_whitespace_as_suffix": True},
    ],
)
def test_every_field_is_what_the_generated_classes_read(options: dict[str, object]) -> None:
    proto = trained(**options)
    theirs = sentencepiece_model_pb2.ModelProto.FromString(proto)
    ours = read_sentencepiece(proto)
    assert [(p.text, p.score, int(p.type)) for p in ours.pieces] == [(p.piece, p.score, p.type) for p in theirs.pieces]
    trainer, normalizer = theirs.trainer_spec, theirs.normalizer_spec
    assert ours.type == ModelType(trainer.model_type)
    assert ours.byte_fallback == trainer.byte_fallback
    assert ours.whitespace_is_suffix == trainer.treat_whitespace_as_suffix
    assert ours.charsmap == normalizer.precompiled_charsmap
    assert ours.add_dummy_prefix == normalizer.add_dummy_prefix
    assert ours.remove_extra_whitespaces == normalizer.remove_extra_whitespaces
    assert ours.escape_whitespaces == normalizer.escape_whitespaces


@pytest.mark.parametrize("proto", [b"\xff", b"{}", b"\x0a\xff\x01ab", b"\x0f", b"\x0a\x04\x10\x01\x18\x09"])
def test_other_bytes_are_no_model(proto: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"^the tokenizer.model is no SentencePiece model \(.+\); copy it again"):
        read_sentencepiece(proto)
