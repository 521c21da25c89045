"""A tokenizer's own chat template, in Jinja: rendered in a sandbox, with the speaker of every character told apart.

The template is rendered with a mark in the place of each text. What stands around the marks is the template's, and may
be control tokens; what takes their places is the user's, and never is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron.data.chat_template import Part
from megatron.data.conversation import Message, Role
from megatron.errors import ConfigError, DataError

_NAMES: Mapping[Role, str] = {Role.SYSTEM: "system", Role.PROMPTER: "user", Role.ASSISTANT: "assistant"}
# Private-use characters, which no text has in this order.
_MARK = "\ue0f0{}\ue0f1"
_MARKS = re.compile("\ue0f0(\\d+)\ue0f1")


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``, with which some templates enclose answers: only the inside."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class JinjaTemplate:
    """`source` with the special tokens' names it may use (bos_token, eos_token, ...), and `controls` by their names.

    An answer, with the token that ends it, counts for the assistant; its header, which the template adds as the
    generation prompt, for the prompter. `drop_space`: the tokenizer puts a space before every text.
    """

    def __init__(self, source: str, names: Mapping[str, str], controls: Mapping[str, int], *, drop_space: bool):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"the chat template is not Jinja ({error}); give another with --chat_template_file."
            ) from error
        self._names, self._controls, self._drop_space = dict(names), dict(controls), drop_space
        found = "|".join(map(re.escape, sorted(self._controls, key=len, reverse=True)))
        self._pattern = re.compile(f"({_MARKS.pattern.replace('(', '(?:')}{'|' + found if found else ''})")

    @property
    def control_tokens(self) -> frozenset[str]:
        return frozenset(self._controls)

    def render(self, messages: Sequence[Message]) -> list[Part]:
        marked = [Message(role, _MARK.format(number)) for number, (role, _) in enumerate(messages)]
        whole = self._text(marked)
        texts = self._texts(messages, whole)
        bounds = self._bounds(marked, whole)
        parts: list[Part] = []
        for start, stop, role in bounds:
            for piece in self._pattern.split(whole[start:stop]):
                mark = _MARKS.fullmatch(piece)
                if piece in self._controls:
                    parts.append(Part(role, self._controls[piece]))
                elif piece:
                    self._add(parts, role, texts[int(mark[1])] if mark else piece)
        return parts

    def _add(self, parts: list[Part], role: Role, text: str) -> None:
        """Text goes to the tokenizer in one piece, unless an answer begins or ends; it counts for who speaks last."""
        last = parts[-1] if parts else None
        if last is None or isinstance(last.content, int):
            parts.append(Part(role, text))
        elif (last.role is Role.ASSISTANT) == (role is Role.ASSISTANT):
            parts[-1] = Part(role, last.content + text)
        else:
            parts.append(Part(role, text[1:] if self._drop_space and text.startswith(" ") else text))

    def _text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        named = [{"role": _NAMES[role], "content": text} for role, text in messages]
        try:
            return self._template.render(messages=named, add_generation_prompt=prompt, **self._names)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the messages ({error}); repair the line.") from error

    def _texts(self, messages: Sequence[Message], whole: str) -> list[str]:
        """What takes the marks' places: the texts, or trimmed if the template trims them."""
        rendered = self._text(messages)
        for trim in (str, str.strip):
            texts: list[str] = [trim(text) for _, text in messages]
            if _MARKS.sub(lambda mark, texts=texts: texts[int(mark[1])], whole) == rendered:  # type: ignore[misc]
                return texts
        raise DataError(
            "the chat template changes this text, so that its tokens cannot be told from the template's; give a "
            "simpler one with --chat_template_file."
        )

    def _bounds(self, marked: Sequence[Message], whole: str) -> list[tuple[int, int, Role]]:
        """Cuts the whole into what each message adds, and answers from their headers."""
        bounds: list[tuple[int, int, Role]] = []
        done = 0
        for number, (role, mark) in enumerate(marked):
            place = whole.find(mark, done)
            if place < 0:  # a message that the template merges into another or leaves out
                continue
            start = done
            if role is Role.ASSISTANT:
                prompt = self._length(marked[:number], whole, prompt=True)
                start = place if prompt is None or not done <= prompt <= place else prompt
                bounds.append((done, start, Role.PROMPTER))
            stop = self._length(marked[: number + 1], whole)
            if stop is None or stop < place + len(mark):
                stop = self._behind_control(whole, place + len(mark))
            bounds.append((start, stop, role))
            done = stop
        return [*bounds, (done, len(whole), marked[-1].role)]

    def _length(self, messages: Sequence[Message], whole: str, *, prompt: bool = False) -> int | None:
        """Up to where `whole` is what these messages alone give; None if it does not begin so."""
        try:
            text = self._text(messages, prompt=prompt) if messages else ""
        except DataError:  # many templates refuse a system message alone
            return None
        return len(text) if whole.startswith(text) else None

    def _behind_control(self, whole: str, place: int) -> int:
        """Behind the control token that follows at once, which ends a message."""
        found = self._pattern.match(whole, place + (whole[place : place + 1] == " "))
        return found.end() if found and found[0] in self._controls else place


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def read_template(path: Path | None, tokenizer_path: str | None) -> tuple[str, Mapping[str, str]]:
    """The text of the template and the special tokens' names: of `path`, else of the tokenizer's own folder."""
    folder = None if tokenizer_path is None else _folder(Path(tokenizer_path))
    config = {} if folder is None else _json(folder / "tokenizer_config.json")
    names = {key: _name(value) for key, value in config.items() if key.endswith("_token") and value is not None}
    if path is not None:
        return _read(path), names
    if folder is not None and (folder / "chat_template.jinja").is_file():
        return _read(folder / "chat_template.jinja"), names
    template = config.get("chat_template")
    if isinstance(template, list):  # several under names
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise ConfigError(
            f"--chat_template tokenizer: {folder} has no chat_template, neither in tokenizer_config.json nor as "
            "chat_template.jinja; give one with --chat_template_file, or use chatml, llama2 or llama3."
        )
    return template, names


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _name(value: object) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path} ({error}); check --chat_template_file.") from error


def _json(path: Path) -> dict[str, Any]:
    load: Callable[[str], Any] = json.loads
    try:
        return load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} ({error}); copy it again from the model.") from error
