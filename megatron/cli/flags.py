"""Flags generated from the fields of a frozen dataclass, and only the typed ones read back.

A field with ``metadata={"help": ...}`` is a flag; a field without is derived or set by another flag. ``metadata`` may
also have "choices" and "metavar". A `bool` that is False by default is switched on by ``--name``; one that is True is
switched off by ``--no_name``, and its help says what is done otherwise. A tuple takes several values.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass
from types import UnionType
from typing import Any, Literal

from megatron.cli.parser import ArgumentParser
from megatron.errors import ConfigError

_KINDS: Mapping[type, str] = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
_METAVARS: Mapping[type, str] = {int: "N", float: "X", str: "TEXT"}


@dataclass(frozen=True)
class FieldType:
    """What a field's annotation allows: `item` values, several of them, or None."""

    item: type
    choices: tuple[object, ...] = ()
    is_tuple: bool = False
    takes_none: bool = False


@dataclass(frozen=True)
class Owner:
    """A dataclass whose fields are flags; `section` is its name in a YAML file and in the run's configuration."""

    section: str
    title: str
    config_type: type

    def flag_fields(self) -> Iterator[Field[Any]]:
        return (field for field in dataclasses.fields(self.config_type) if "help" in field.metadata)

    def field_types(self) -> dict[str, FieldType]:
        hints = typing.get_type_hints(self.config_type)
        return {field.name: _field_type(field, hints[field.name]) for field in dataclasses.fields(self.config_type)}

    def dest(self, name: str) -> str:
        return f"{self.section}.{name}"


def add_flags(
    parser: ArgumentParser, owner: Owner, *, without: frozenset[str] = frozenset()
) -> argparse._ArgumentGroup:
    """Adds a titled group with the owner's flags, but for the fields in `without`. What is not typed sets nothing."""
    group = parser.add_argument_group(owner.title)
    types = owner.field_types()
    for field in owner.flag_fields():
        if field.name in without:
            continue
        kind = types[field.name]
        common: dict[str, Any] = {"dest": owner.dest(field.name), "default": argparse.SUPPRESS, "help": _help(field)}
        if kind.item is bool:
            if field.default is True:
                group.add_argument(f"--no_{field.name}", action="store_false", **common)
            else:
                group.add_argument(f"--{field.name}", action="store_true", **common)
        else:
            group.add_argument(
                f"--{field.name}",
                type=kind.item,
                choices=kind.choices or None,
                nargs="+" if kind.is_tuple else None,
                metavar=None if kind.choices else field.metadata.get("metavar", _METAVARS[kind.item]),
                **common,
            )
    return group


def typed_fields(namespace: argparse.Namespace, owner: Owner) -> dict[str, object]:
    """The fields of `owner` that were typed."""
    prefix = f"{owner.section}."
    typed = {name.removeprefix(prefix): value for name, value in vars(namespace).items() if name.startswith(prefix)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}


def convert(value: object, kind: FieldType, name: str) -> object:
    """A value from a YAML file as the field's type; raises ConfigError where it is not one.

    Text is read as the command line would read it: to YAML, 3e-4 is a text.
    """
    if value is None and kind.takes_none:
        return None
    if dataclasses.is_dataclass(kind.item):
        return _convert_nested(value, kind.item, name)
    if kind.is_tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert_item(item, kind, name) for item in values)
    return _convert_item(value, kind, name)


def _convert_item(value: object, kind: FieldType, name: str) -> object:
    converted = value
    if isinstance(value, str) and kind.item in (int, float):
        with contextlib.suppress(ValueError):
            converted = kind.item(value)
    elif isinstance(value, int) and not isinstance(value, bool) and kind.item in (float, str):
        converted = kind.item(value)
    if type(converted) is not kind.item:
        raise ConfigError(f"{name}: {value!r} is not {_KINDS[kind.item]}; give one.")
    if kind.choices and converted not in kind.choices:
        choices = ", ".join(str(choice) for choice in kind.choices)
        raise ConfigError(f"{name}: {value!r} is not one of its choices; use {choices}.")
    return converted


def _convert_nested(value: object, config_type: type, name: str) -> object:
    types = Owner(name, name, config_type).field_types()
    if not isinstance(value, Mapping) or not types.keys() >= value.keys():
        raise ConfigError(f"{name}: {value!r} is not a set of values; give {', '.join(types)}.")
    return config_type(**{key: convert(item, types[key], f"{name}.{key}") for key, item in value.items()})


def _field_type(field: Field[Any], annotation: Any) -> FieldType:
    kind = _read_annotation(annotation)
    return dataclasses.replace(
        kind,
        choices=field.metadata.get("choices", kind.choices),
        # A size that is derived from others is annotated as it is afterwards, and absent until then.
        takes_none=kind.takes_none or field.default is None,
    )


def _read_annotation(annotation: Any) -> FieldType:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return dataclasses.replace(_read_annotation(inner), takes_none=True)
    if origin is Literal:
        return FieldType(item=type(arguments[0]), choices=arguments)
    if origin is tuple:
        return dataclasses.replace(_read_annotation(arguments[0]), is_tuple=True)
    return FieldType(item=annotation)


def _help(field: Field[Any]) -> str:
    text = str(field.metadata["help"])
    if field.default is True:
        return f"do not {text}"
    if (
        field.default is not MISSING
        and field.default is not None
        and field.default != ()
        and field.default is not False
    ):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text = f"{text} (default: {default})"
    return text.replace("%", "%%")
