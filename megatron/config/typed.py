"""What the user typed, on the command line or in a YAML file, before anything is inferred from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron.cli.entry import warn
from megatron.cli.flags import Owner, convert, typed_fields
from megatron.cli.parser import ArgumentParser, describe_unknown_flag
from megatron.config.original_flags import REFUSED
from megatron.config.owners import OWNERS, make_parser
from megatron.errors import ConfigError


@dataclass(frozen=True)
class TypedFlags:
    """The fields that were typed, by section ("model", "parallel", ...). A field that was not typed is absent."""

    sections: Mapping[str, Mapping[str, object]]

    def section(self, name: str) -> Mapping[str, object]:
        return self.sections.get(name, {})


def parse_run(argv: Sequence[str]) -> TypedFlags:
    """Reads the flags of a run, and under them those of ``--config``. Warns once of flags that have no effect.

    Raises ConfigError for unknown flags and keys, and for values that are not of a flag's type.
    """
    parser = make_parser(
        prog="finetune.py", description="Train or finetune a language model on any TP x PP x DP layout."
    )
    namespace = parser.parse_args(list(argv))
    accepted = list(getattr(namespace, "accepted", []))
    typed = {owner.section: typed_fields(namespace, owner) for owner in OWNERS}
    if hasattr(namespace, "config"):
        under, noted = _read_file(Path(namespace.config), parser)
        typed = {section: {**under[section], **fields} for section, fields in typed.items()}
        accepted = noted + accepted
    if accepted:
        warn(f"no effect here: {'; '.join(dict.fromkeys(accepted))}.")
    return TypedFlags(typed)


def _read_file(path: Path, parser: ArgumentParser) -> tuple[dict[str, dict[str, object]], list[str]]:
    """The fields that a YAML file sets, by section, and the flags in it that have no effect.

    A key at the top is a flag's or a field's name; below a section's name, it is a field of that section.
    """
    typed: dict[str, dict[str, object]] = {owner.section: {} for owner in OWNERS}
    tokens: list[str] = []
    for key, value in _load_mapping(path).items():
        owner = next((owner for owner in OWNERS if owner.section == key), None)
        if owner is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path}: {key}: {value!r} is not a section; write its fields below it, indented.")
            typed[owner.section].update(_read_section(path, owner, value))
            continue
        name = str(key).replace("-", "_")
        field_owner = _owner_of(name)
        if field_owner is not None:
            typed[field_owner.section][name] = convert(value, field_owner.field_types()[name], f"{path}: {key}")
        elif name in parser.flag_names() and name not in ("config", "help"):
            tokens += _as_typed(path, parser.flag_names()[name], value)
        else:
            known = [*parser.flag_names(), *(owner.section for owner in OWNERS)]
            raise ConfigError(f"{path}: {_unknown_key(str(key), known)}")
    namespace = parser.parse_args(tokens)
    for owner in OWNERS:
        typed[owner.section].update(typed_fields(namespace, owner))
    return typed, list(getattr(namespace, "accepted", []))


def _read_section(path: Path, owner: Owner, section: Mapping[object, object]) -> dict[str, object]:
    types = owner.field_types()
    fields: dict[str, object] = {}
    for key, value in section.items():
        if key not in types:
            raise ConfigError(f"{path}: {_unknown_key(str(key), list(types))}")
        fields[str(key)] = convert(value, types[str(key)], f"{path}: {key}")
    return fields


def _owner_of(name: str) -> Owner | None:
    """The owner of the field that a key outside any section means: the one whose flag it is."""
    owners = [o for o in OWNERS if any(field.name == name for field in o.flag_fields())]
    return owners[-1] if owners else None  # vocab_size: the tokenizer's, as on the command line


def _as_typed(path: Path, flag: str, value: object) -> list[str]:
    """What would be typed for a key that is a flag, but not a field."""
    if value is True:
        return [flag]
    if value is False or value is None:
        return []
    if isinstance(value, (str, int, float)):
        return [f"{flag}={value}"]
    raise ConfigError(f"{path}: {flag.lstrip('-')}: {value!r} is not a single value; give one.")


def _unknown_key(key: str, known: Sequence[str]) -> str:
    return describe_unknown_flag(key, known, REFUSED).replace("did you mean --", "did you mean ")


def _load_mapping(path: Path) -> Mapping[object, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror}); check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"--config {path} is not YAML: {where}; write one 'flag: value' a line.") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"--config {path} holds no flags, but {content!r}; write one 'flag: value' a line.")
    return content
