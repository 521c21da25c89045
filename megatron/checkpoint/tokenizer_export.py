"""The tokenizer of a checkpoint as files that transformers loads: every added token has its id, in text too.

A Hugging Face tokenizer that nothing was added to is copied byte for byte. Where tokens were added they go into its
tokenizer.json; a SentencePiece tokenizer gets a tokenizer.json of its own, beside its tokenizer.model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tokenizers import Tokenizer as Model
from tokenizers import processors

from megatron.checkpoint.sentencepiece_proto import PieceType, SentencePieceModel, read_sentencepiece
from megatron.checkpoint.tokenizer_files import CONFIG_FILE, HUGGING_FACE_FILE, SENTENCEPIECE_FILE, tokenizer_files
from megatron.checkpoint.tokenizer_json import first_difference, tokenizer_json
from megatron.checkpoint.tokenizer_roles import ROLES, content, override_roles
from megatron.errors import TokenizerError
from megatron.tokenizer.build import build_tokenizer, fit_to_vocabulary
from megatron.tokenizer.config import TokenizerConfig
from megatron.tokenizer.huggingface import HuggingFaceTokenizer
from megatron.tokenizer.library import LibraryTokenizer
from megatron.tokenizer.protocol import Tokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron.tokenizer.wordpiece import ROLES as WORDPIECE_ROLES
from megatron.tokenizer.wordpiece import UNKNOWN, BertWordPieceCase

_MAP_FILE: Final = "special_tokens_map.json"
_ADDED_ROLES: Final = (("cls", "<CLS>"), ("sep", "<SEP>"), ("mask", "<MASK>"))
_FLAGS: Final = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# What else transformers has to know where there is nothing but a vocab.txt.
_BERT_SETTINGS: Final[Mapping[str, Any]] = MappingProxyType(
    {"unk_token": UNKNOWN, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
)
# What a tokenizer_config.json beside a SentencePiece model says that added tokens do not change.
_CARRIED: Final = (
    *("add_bos_token", "add_eos_token", "chat_template", "model_max_length", "padding_side", "truncation_side"),
    "clean_up_tokenization_spaces",
)


@dataclass(frozen=True)
class ExportedTokenizer:
    """`files` by the names they are to get. `tokenizer` is None where they are copied as they are.

    `overridden` has the ids that were asked for ("eos_token_id"). `differing_text` is one that transformers would cut
    otherwise than `tokenizer` does, None where no difference was found.
    """

    files: Mapping[str, Path]
    tokenizer: Tokenizer | None = None
    overridden: Mapping[str, int] = field(default_factory=dict)
    differing_text: str | None = None

    def ids(self) -> dict[str, int]:
        """What the config.json of a model that was born here says: ``{"eos_token_id": 2}``."""
        main = self.files.get(HUGGING_FACE_FILE) or self.files.get(SENTENCEPIECE_FILE)
        if self.tokenizer is None and main is None:
            return dict(self.overridden)
        built = self.tokenizer or build_tokenizer(TokenizerConfig(tokenizer_model=str(main), no_new_tokens=True))
        ids = {"bos_token_id": built.bos, "eos_token_id": built.eos, "pad_token_id": built.pad}
        return {**{key: token for key, token in ids.items() if token is not None}, **self.overridden}

    def stop_ids(self) -> list[int]:
        """Where generation ends: at eos, and where documents ended when the model was trained."""
        if self.tokenizer is None or self.tokenizer.eod is None:
            return []
        eos = self.ids().get("eos_token_id")
        return sorted({self.tokenizer.eod, *([] if eos is None else [eos])})


def export_tokenizer(
    config: TokenizerConfig, num_rows: int, folder: Path, overrides: Mapping[str, str] | None = None
) -> ExportedTokenizer:
    """Writes what has to change into `folder`; other files are to be copied from where they are.

    `num_rows` is the number of embedding rows without padding. `overrides` gives other tokens to roles. Raises
    TokenizerError for an id without a row, ConfigError for an override that the vocabulary does not have.
    """
    assert config.path is not None
    files = tokenizer_files(Path(config.path), None if config.merge_file is None else Path(config.merge_file))
    additions = config.vocab_extra_ids > 0 or bool(config.vocab_extra_ids_list)
    if not additions and _is_hugging_face(config, files):
        return _copied(files, folder, overrides or {})
    tokenizer = fit_to_vocabulary(config, num_rows)
    difference = None
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = read_sentencepiece(files[SENTENCEPIECE_FILE].read_bytes())
        model = tokenizer_json(tokenizer, proto, config.vocab_extra_ids_list)
        settings = _settings(tokenizer, proto, model, _read(files.get(CONFIG_FILE)))
        model.post_processor = _template(settings, model)
        difference = first_difference(tokenizer, model, proto)
    else:
        assert isinstance(tokenizer, LibraryTokenizer)
        model = Model.from_str(tokenizer.library.to_str())
        settings = _library_settings(tokenizer, files)
        if isinstance(tokenizer, BertWordPieceCase):
            model.post_processor = _pairs(tokenizer)
    files = {name: file for name, file in files.items() if name != "added_tokens.json"}
    model, settings, overridden = override_roles(model, settings, overrides or {})
    return ExportedTokenizer({**files, **_write(folder, model, settings)}, tokenizer, overridden, difference)


def _is_hugging_face(config: TokenizerConfig, files: Mapping[str, Path]) -> bool:
    """Whether tokenizer.json is the tokenizer, and no other file that lies beside it."""
    assert config.path is not None
    if config.tokenizer_type is not None:
        return config.tokenizer_type == HuggingFaceTokenizer.name
    is_its_place = Path(config.path).is_dir() or config.path.endswith(".json")
    return HUGGING_FACE_FILE in files and is_its_place


def _copied(files: Mapping[str, Path], folder: Path, overrides: Mapping[str, str]) -> ExportedTokenizer:
    if not overrides:
        return ExportedTokenizer(files)
    if HUGGING_FACE_FILE in files:
        model = _load(files[HUGGING_FACE_FILE])
    elif SENTENCEPIECE_FILE in files:
        config = TokenizerConfig(tokenizer_model=str(files[SENTENCEPIECE_FILE]), no_new_tokens=True)
        tokenizer = build_tokenizer(config)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        model = tokenizer_json(tokenizer, read_sentencepiece(files[SENTENCEPIECE_FILE].read_bytes()), ())
    else:
        raise TokenizerError(
            f"--override_special_tokens needs a {HUGGING_FACE_FILE} or {SENTENCEPIECE_FILE}, and the tokenizer has "
            f"{', '.join(files)}; save it with transformers, which writes {HUGGING_FACE_FILE}."
        )
    settings = _published(files)
    model, settings, overridden = override_roles(model, settings, overrides)
    return ExportedTokenizer({**files, **_write(folder, model, settings)}, None, overridden)


def _settings(
    tokenizer: SentencePieceTokenizer, proto: SentencePieceModel, model: Model, published: Mapping[str, Any]
) -> dict[str, Any]:
    """The tokenizer_config.json of a SentencePiece tokenizer: its roles, and what was published beside it."""
    names = {i: piece.text for i, piece in enumerate(proto.pieces)}
    names |= {i: name for name, i in tokenizer.added_tokens.items()}
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == PieceType.UNKNOWN)
    pad = tokenizer.pad if tokenizer.pad != tokenizer.eos else None
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": unknown, "pad": pad}
    roles = {role: names[i] for role, i in ids.items() if i is not None}
    roles |= {role: name for role, name in _ADDED_ROLES if name in tokenizer.added_tokens}
    settings: dict[str, Any] = {
        # No class that rebuilds the tokenizer from its vocabulary alone.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.bos is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **{key: published[key] for key in _CARRIED if key in published},
    }
    for role in ROLES:
        token = content(published.get(f"{role}_token"))
        if token is not None and model.token_to_id(token) is not None:
            settings[f"{role}_token"] = token
        elif role in roles:
            settings[f"{role}_token"] = roles[role]
    return settings


def _library_settings(tokenizer: LibraryTokenizer, files: Mapping[str, Path]) -> dict[str, Any]:
    """The tokenizer_config.json of any other tokenizer: what was published, or else the roles it has here."""
    model = tokenizer.library
    roles = ("bos", "eos", "pad", "cls", "sep", "mask")
    ids = {f"{role}_token": tokenizer.special_id(role) for role in roles}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: model.id_to_token(token) for key, token in ids.items() if token is not None},
        **(_BERT_SETTINGS if isinstance(tokenizer, BertWordPieceCase) else {}),
        **_published(files),
    }
    # Classes that rebuild the tokenizer learn of its tokens here.
    settings["added_tokens_decoder"] = {
        str(token): {key: getattr(added, key) for key in _FLAGS}
        for token, added in sorted(model.get_added_tokens_decoder().items())
    }
    return settings


def _published(files: Mapping[str, Path]) -> dict[str, Any]:
    """The settings of a tokenizer, with the roles that older ones name in a file of their own."""
    settings = {**_read(files.get(_MAP_FILE)), **_read(files.get(CONFIG_FILE))}
    roles = {key: content(settings[key]) for role in ROLES if (key := f"{role}_token") in settings}
    return {**settings, **roles}


def _template(settings: Mapping[str, Any], model: Model) -> processors.TemplateProcessing:
    """What transformers would make of the settings; programs that read tokenizer.json alone need it there."""
    around = [
        content(settings.get(f"{role}_token")) if settings[f"add_{role}_token"] else None for role in ("bos", "eos")
    ]
    bos, eos = (f"{token}:{{0}}" if token is not None else "" for token in around)
    single, second = (f"{bos} {text}:{{0}} {eos}".strip() for text in ("$A", "$B"))
    special = [(token, model.token_to_id(token)) for token in around if token is not None]
    return processors.TemplateProcessing(
        single=single.format(0), pair=f"{single.format(0)} {second.format(1)}", special_tokens=special
    )


def _pairs(tokenizer: BertWordPieceCase) -> processors.BertProcessing:
    """[CLS] first [SEP] second [SEP], as the model was trained, of types 0 and 1."""
    assert tokenizer.cls is not None and tokenizer.sep is not None
    return processors.BertProcessing((WORDPIECE_ROLES["sep"], tokenizer.sep), (WORDPIECE_ROLES["cls"], tokenizer.cls))


def _write(folder: Path, model: Model, settings: Mapping[str, Any]) -> dict[str, Path]:
    roles = [*(f"{role}_token" for role in ROLES), "additional_special_tokens", "extra_special_tokens"]
    named = {key: settings[key] for key in roles if settings.get(key) is not None}
    texts = {HUGGING_FACE_FILE: model.to_str(pretty=True), CONFIG_FILE: _json(settings), _MAP_FILE: _json(named)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in texts}


def _load(file: Path) -> Model:
    return Model.from_str(_text(file))


def _read(file: Path | None) -> dict[str, Any]:
    return {} if file is None else json.loads(_text(file))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
