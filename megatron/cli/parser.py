"""An argument parser that takes both spellings of a flag and explains mistakes in one line."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NoReturn

from megatron.errors import ConfigError

_KINDS: Final[Mapping[type, str]] = MappingProxyType({int: "an integer", float: "a number"})
_OF_TORCHRUN = ("nproc_per_node", "n_proc_per_node", "nnodes", "nodes", "node_rank", "master_addr", "master_port")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """`argparse` with `--micro_batch_size` and `--micro-batch-size` alike, no abbreviations, and ConfigErrors.

    `refused` maps flags that users know from elsewhere, spelled with underscores and without dashes, to what the
    error says after their name; any other unknown flag is answered with the nearest one there is.
    """

    def __init__(self, *, refused: Mapping[str, str] | None = None, **kwargs: Any):
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self._refused = refused or {}
        # argparse takes -1 for a value, but -1e-4 for a flag.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse's. Raises ConfigError for an unknown flag, a bad value, or a value that belongs to no flag."""
        typed = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # a subcommand's flags are known to its own parser alone
            self._refuse_unknown(_flags_in(typed))
        namespace, strays = self.parse_known_args(typed, namespace)
        self._refuse_unknown(_flags_in(strays))
        if strays:
            raise ConfigError(self._describe_stray(strays[0], typed))
        return namespace

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse's, with every known flag respelled as it was added."""
        typed = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._respell(typed), namespace)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError where argparse prints the usage and exits."""
        raise ConfigError(f"{message.removeprefix('argument ')}; --help says what each flag takes.")

    def flag_names(self) -> dict[str, str]:
        """Each long flag's name (underscores, no dashes) and its spelling as it was added."""
        return {_name(option): option for option in self._option_string_actions if option.startswith("--")}

    def _respell(self, typed: Sequence[str]) -> list[str]:
        spellings = self.flag_names()
        respelled: list[str] = []
        for position, token in enumerate(typed):
            if token == "--":
                return respelled + list(typed[position:])
            flag, equals, value = token.partition("=")
            if flag.startswith("--"):
                flag = spellings.get(_name(flag), flag)
            respelled.append(flag + equals + value)
        return respelled

    def _refuse_unknown(self, flags: Sequence[str]) -> None:
        known = self.flag_names()
        for flag in flags:
            if flag not in self._option_string_actions and _name(flag) not in known:
                raise ConfigError(describe_unknown_flag(flag, known, self._refused))

    def _describe_stray(self, stray: str, typed: Sequence[str]) -> str:
        """Names the flag that a value without a flag was typed after."""
        if stray.startswith("-"):
            return f"{stray} is not a flag of this program: flags begin with two dashes; --help lists them all."
        # The same text may be some other flag's value.
        positions = [i for i, token in enumerate(typed) if token == stray]
        position = next((i for i in positions if not self._belongs_to_flag(typed, i)), positions[0])
        start = _last_flag(typed[:position])
        if start is None:
            return f"{stray!r} belongs to no flag; remove it, or write the flag before it."
        phrase = " ".join(typed[start:position])
        return f"{stray!r} after {phrase!r} belongs to no flag: {phrase!r} is complete without it; remove {stray!r}."

    def _belongs_to_flag(self, typed: Sequence[str], position: int) -> bool:
        """Whether the flag before `position` takes as many values as there are up to it."""
        start = _last_flag(typed[:position])
        if start is None or "=" in typed[start]:
            return False
        action = self._option_string_actions.get(self._respell([typed[start]])[0])
        takes = 1 if action is None or action.nargs is None else action.nargs
        return not isinstance(takes, int) or position - start <= takes

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            kind = _KINDS.get(action.type) if isinstance(action.type, type) else None
            reason = f"is not {kind}; give one" if kind else f"cannot be read: {error.message}"
            raise ConfigError(f"{_spelling(action)} {arg_string} {reason}; --help says what it takes.") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise ConfigError(f"{_spelling(action)} {value} is not one of its choices{hint}; use {', '.join(choices)}.")


def describe_unknown_flag(flag: str, known: Collection[str], refused: Mapping[str, str]) -> str:
    """What to tell about a flag or a key of a configuration file that does not exist."""
    name = _name(flag)
    if name in refused:
        return f"{flag} {refused[name]}"
    if name in _OF_TORCHRUN:
        return f"{flag} is an option of torchrun, not of this program; put it before the script's name."
    completions = sorted(other for other in known if other.startswith(name))
    nearest = difflib.get_close_matches(name, list(known), n=1) or completions
    if not nearest:
        return f"{flag} is not a flag of this program, and none is spelled like it; --help lists them all."
    return f"{flag} is not a flag of this program; did you mean --{nearest[0]}?"


def _name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _spelling(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _flags_in(tokens: Sequence[str]) -> list[str]:
    """The long flags among `tokens`, without the values attached by '='."""
    end = tokens.index("--") if "--" in tokens else len(tokens)
    return [token.partition("=")[0] for token in tokens[:end] if token.startswith("--")]


def _last_flag(tokens: Sequence[str]) -> int | None:
    return max((i for i, token in enumerate(tokens) if token.startswith("--")), default=None)
