"""The roles of special tokens: bos, eos, pad, ..., and giving them to other tokens than a tokenizer's files do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from tokenizers import Tokenizer

from megatron.errors import ConfigError

ROLES: Final = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")

# Those whose ids config.json states, too.
_ROLES_OF_MODELS: Final = ("bos", "eos", "pad", "sep")

# Those that a template puts around a text. One token may have several: where it stands says which of them it is.
_ROLES_AT: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"before a text": ("bos", "cls"), "after a text": ("eos", "sep"), "between texts": ("bos", "cls", "eos", "sep")}
)


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

    The template that puts bos, cls, eos or sep around a text follows them. Raises ConfigError for a token that does
    not exist, and where the template leaves open which of two roles it means.
    """
    changed = dict(settings)
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
        changed[f"{role}_token"] = token
    description = json.loads(model.to_str())
    for template in _templates(description.get("post_processor")):
        _rename(template, _roles_of_tokens(settings, overrides), model)
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


def _roles_of_tokens(settings: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Token -> the roles it has in a template -> the token that each will have."""
    roles_of: dict[str, dict[str, str]] = {}
    for role in _ROLES_AT["between texts"]:
        if (token := content(settings.get(f"{role}_token"))) is not None:
            roles_of.setdefault(token, {})[role] = overrides.get(role, token)
    return roles_of


def _rename(template: dict[str, Any], roles_of: Mapping[str, Mapping[str, str]], model: Tokenizer) -> None:
    places_alone: dict[str, set[str]] = {}
    for token, place in _special_steps(template["single"]):
        places_alone.setdefault(token["id"], set()).add(place)
    known = template["special_tokens"]
    for token, place in [*_special_steps(template["single"]), *_special_steps(template["pair"])]:
        before = token["id"]
        if before not in roles_of:
            continue
        if place == "between texts" and len(alone := places_alone.get(before, set())) == 1:
            (place,) = alone  # two texts, each as if it were alone
        token["id"] = name = _renamed(before, place, roles_of[before])
        known.setdefault(name, {"id": name, "ids": [model.token_to_id(name)], "tokens": [name]})
    used = {token["id"] for steps in ("single", "pair") for token, _ in _special_steps(template[steps])}
    template["special_tokens"] = {name: known[name] for name in known if name in used or name not in roles_of}


def _special_steps(steps: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each special token of a template, and where it stands."""
    texts = [index for index, step in enumerate(steps) if "Sequence" in step]
    for index, step in enumerate(steps):
        if "SpecialToken" in step:
            follows, precedes = any(text < index for text in texts), any(text > index for text in texts)
            yield (
                step["SpecialToken"],
                "between texts" if follows and precedes else "after a text" if follows else "before a text",
            )


def _renamed(token: str, place: str, roles: Mapping[str, str]) -> str:
    meant = {role: name for role, name in roles.items() if role in _ROLES_AT[place]} or roles
    names = set(meant.values())
    if len(names) > 1:
        raise ConfigError(
            f"--override_special_tokens: {' and '.join(meant)} share the token {token!r}, which the tokenizer's "
            f"template puts {place} without saying which it means; give them one token, such as "
            f"{' '.join(f'{role}={sorted(names - {token})[0]!r}' for role in meant)}."
        )
    return names.pop()
