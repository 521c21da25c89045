"""The roles of special tokens: bos, eos, pad, ..., and giving them to other tokens than a tokenizer's files do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

from megatron.errors import ConfigError

ROLES: Final = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")

# Those whose ids config.json states, too.
_ROLES_OF_MODELS: Final = ("bos", "eos", "pad", "sep")


def parse_overrides(pairs: Sequence[str]) -> dict[str, str]:
    """``eos=<|im_end|>`` -> role and token. Raises ConfigError for what is no such pair."""
    overrides: dict[str, str] = {}
    for pair in pairs:
        role, separator, token = pair.partition("=")
        if not separator or not token or role not in ROLES:
            raise ConfigError(
                f"--override_special_tokens {pair}: give role=token, with a role of {', '.join(ROLES)}; "
                'eos="<|im_end|>", say.'
            )
        if role in overrides:
            raise ConfigError(f"--override_special_tokens names {role} more than once; give every role one token.")
        overrides[role] = token
    return overrides


def override_roles(
    model: Tokenizer, settings: Mapping[str, Any], overrides: Mapping[str, str]
) -> tuple[Tokenizer, dict[str, Any], dict[str, int]]:
    """tokenizer.json, tokenizer_config.json and the ids for config.json ("eos_token_id") with the roles as asked for.

    The template that puts bos or eos around a text follows them. Raises ConfigError for a token that does not exist.
    """
    changed = dict(settings)
    tokens: dict[str, tuple[str, int]] = {}
    ids: dict[str, int] = {}
    for role, token in overrides.items():
        token_id = model.token_to_id(token)
        if token_id is None:
            raise ConfigError(
                f"--override_special_tokens {role}={token}: the tokenizer has no token {token!r}; name one that it "
                "has, or train with it in --vocab_extra_ids_list."
            )
        if role in _ROLES_OF_MODELS:
            ids[f"{role}_token_id"] = token_id
        if (before := content(settings.get(f"{role}_token"))) is not None:
            tokens[before] = (token, token_id)
        changed[f"{role}_token"] = token
    description = json.loads(model.to_str())
    for template in _templates(description.get("post_processor")):
        _rename(template, tokens)
    return Tokenizer.from_str(json.dumps(description)), changed, ids


def content(token: object) -> str | None:
    """The text of a special token, which transformers writes as a string or as a description."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _templates(processor: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    if processor is None:
        return
    if processor["type"] == "TemplateProcessing":
        assert isinstance(processor, dict)
        yield processor
    for part in processor.get("processors", ()):
        yield from _templates(part)


def _rename(template: dict[str, Any], tokens: Mapping[str, tuple[str, int]]) -> None:
    for step in [*template["single"], *template["pair"]]:
        if "SpecialToken" in step and step["SpecialToken"]["id"] in tokens:
            step["SpecialToken"]["id"] = tokens[step["SpecialToken"]["id"]][0]
    for before in tokens.keys() & template["special_tokens"].keys():
        token, token_id = tokens[before]
        del template["special_tokens"][before]
        template["special_tokens"][token] = {"id": token, "ids": [token_id], "tokens": [token]}
