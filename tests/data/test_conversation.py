from __future__ import annotations

import json

import pytest

from megatron.data.conversation import Message, RecordKeys, Role, parse_conversation
from megatron.errors import DataError

CHAT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Arr"}]
TURN = (Message(Role.PROMPTER, "Hi"), Message(Role.ASSISTANT, "Arr"))


def parse(record: dict[str, object], **keys: str) -> tuple[Message, ...]:
    return parse_conversation(json.dumps(record).encode(), RecordKeys(**keys))


@pytest.mark.parametrize("key", ["conversations", "messages", "turns"])
def test_the_system_message_beside_a_list_comes_before_it(key):
    keys = {"chat": key} if key == "turns" else {}
    record = {"prompt": "Be a pirate.", key: CHAT}
    assert parse(record, system="prompt", **keys) == (Message(Role.SYSTEM, "Be a pirate."), *TURN)
    assert parse(record, **keys) == TURN


@pytest.mark.parametrize("beside", [{}, {"system": "theirs"}])
def test_a_list_that_begins_with_a_system_message_keeps_its_own(beside):
    record = {**beside, "messages": [{"role": "system", "content": "own"}, *CHAT]}
    assert parse(record, system="system") == (Message(Role.SYSTEM, "own"), *TURN)


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_system_message_beside_a_list_is_none(empty):
    assert parse({"system": empty, "messages": CHAT}, system="system") == TURN


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"sys": "a", "messages": CHAT}, "no key 'system' beside the messages, the object has 'sys', 'messages'; name"),
        ({"system": 5, "messages": CHAT}, "'system' holds .*, not a string; only text is tokenized"),
    ],
)
def test_a_system_message_that_cannot_be_read_is_an_error(record, message):
    with pytest.raises(DataError, match=message):
        parse(record, system="system")
