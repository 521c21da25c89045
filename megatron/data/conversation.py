"""Conversations in JSON lines: a question and its answer under keys, or a list of messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from megatron.data.documents import JsonLines, OnBad
from megatron.data.json_value import described, parse_json_line
from megatron.data.utf8 import reason_and_remedy
from megatron.errors import DataError


class Role(IntEnum):
    """Who speaks; the numbers are those of the role files."""

    SYSTEM = 0
    PROMPTER = 1
    ASSISTANT = 2


class Message(NamedTuple):
    role: Role
    content: str


class Conversation(NamedTuple):
    """`line` is where it stands in its file."""

    line: int
    messages: tuple[Message, ...]


# The names of OpenAI's chats and of ShareGPT's.
ROLE_NAMES: Final[Mapping[str, Role]] = MappingProxyType(
    {
        "system": Role.SYSTEM,
        "user": Role.PROMPTER,
        "human": Role.PROMPTER,
        "prompter": Role.PROMPTER,
        "assistant": Role.ASSISTANT,
        "gpt": Role.ASSISTANT,
    }
)
CHAT_KEYS = ("messages", "conversations")


@dataclass(frozen=True)
class RecordKeys:
    """Where a record has its conversation: a list of messages under `chat`, or one turn under the other keys.

    Without `chat` a record that has no `question` may have its list under one of `CHAT_KEYS`. The system message may
    stand beside a list, under `system`, or in it, as its first.
    """

    question: str = "input"
    answer: str = "output"
    system: str | None = None
    chat: str | None = None


def read_conversations(chunk: JsonLines, keys: RecordKeys, on_bad: OnBad) -> Iterator[Conversation]:
    """The chunk's conversations; the error of a line that has none, with its place, is told to `on_bad`."""
    for line, raw in chunk.records():
        try:
            yield Conversation(line, parse_conversation(raw, keys, is_first=line == 1))
        except DataError as error:
            on_bad(_placed(chunk.path, line, error))


def _placed(path: Path, line: int, error: DataError) -> DataError:
    return DataError(f"{path}:{line}: {error}")


def parse_conversation(raw: bytes, keys: RecordKeys, *, is_first: bool = False) -> tuple[Message, ...]:
    """One line's messages. `is_first`: it may begin with a byte-order mark."""
    record = _parse_object(raw, is_first)
    if keys.chat is not None:
        return _chat(record, keys.chat, keys.system)
    if keys.question not in record:
        for key in CHAT_KEYS:
            if key in record:
                return _chat(record, key, keys.system)
    turn = [Message(Role.PROMPTER, _text(record, keys.question)), Message(Role.ASSISTANT, _text(record, keys.answer))]
    if keys.system is not None:
        turn.insert(0, Message(Role.SYSTEM, _text(record, keys.system)))
    return tuple(turn)


def _parse_object(raw: bytes, is_first: bool) -> dict[str, Any]:
    try:
        value = parse_json_line(raw, is_first=is_first)
    except UnicodeDecodeError as error:
        raise DataError(reason_and_remedy(error, is_first=is_first)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); every line must be one JSON object.") from error
    if not isinstance(value, dict):
        raise DataError(f"{described(value)}, not a JSON object; every line must be one.")
    return value


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise DataError(
            f"no key {key!r}, the object has {', '.join(map(repr, record)) or 'none'}; name the keys with "
            "--question_key, --answer_key and --system_key, or a list of messages with --chat_key."
        )
    return _checked(record[key], repr(key))


def _chat(record: dict[str, Any], key: str, system_key: str | None) -> tuple[Message, ...]:
    """The list under `key`, after the system message beside it; a list that begins with its own keeps that."""
    messages = _messages(record, key)
    if system_key is None or messages[0].role is Role.SYSTEM:
        return messages
    if system_key not in record:
        raise DataError(
            f"no key {system_key!r} beside the messages, the object has {', '.join(map(repr, record))}; name the key "
            "with --system_key, and give a line without a system message an empty one."
        )
    system = record[system_key]
    if system is None or system == "":
        return messages
    return (Message(Role.SYSTEM, _checked(system, repr(system_key))), *messages)


def _messages(record: dict[str, Any], key: str) -> tuple[Message, ...]:
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"no list of messages under {key!r}, the object has {', '.join(map(repr, record)) or 'none'}; name the key "
            "with --chat_key."
        )
    return tuple(_message(message, f"message {number} of {key!r}") for number, message in enumerate(messages))


def _message(message: object, what: str) -> Message:
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and role_key in message and content_key in message:
            name = message[role_key]
            if not isinstance(name, str) or name.lower() not in ROLE_NAMES:
                raise DataError(
                    f"{what} is from {name!r}, which is none of {', '.join(ROLE_NAMES)}; rename or drop it."
                )
            return Message(ROLE_NAMES[name.lower()], _checked(message[content_key], f"{content_key!r} of {what}"))
    raise DataError(f"{what} has neither 'role' and 'content' nor 'from' and 'value'; write every message so.")


def _checked(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} holds {described(value)}, not a string; only text is tokenized.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half a surrogate pair ({value[error.start]!a}), which no text contains; repair or remove "
            "the line."
        ) from error
    return value
