"""How a conversation becomes one sequence: text and control tokens, each with the role that it counts for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from megatron.data.conversation import Message, Role
from megatron.errors import ConfigError, DataError
from megatron.tokenizer.protocol import Tokenizer


class Part(NamedTuple):
    """A control token's id, or text that never becomes one."""

    role: Role
    content: str | int


class ChatTemplate(Protocol):
    def render(self, messages: Sequence[Message]) -> list[Part]:
        """Raises DataError for messages that the template has no place for."""

    @property
    def control_tokens(self) -> frozenset[str]:
        """Tokens that text may name without meaning them, even if the tokenizer finds its added tokens in text."""


@dataclass(frozen=True)
class ChatML:
    """``<|im_start|>name``, the text, ``<|im_end|>``: all of it counts for its speaker, as in Megatron-LLM's files."""

    start: int
    end: int
    names: tuple[str, str, str] = ("system", "question", "answer")
    control_tokens: frozenset[str] = frozenset({"<|im_start|>", "<|im_end|>"})

    def render(self, messages: Sequence[Message]) -> list[Part]:
        return [
            Part(role, content)
            for role, text in messages
            for content in (self.start, f"{self.names[role]}\n{text}", self.end, "\n")
        ]


@dataclass(frozen=True)
class Llama2:
    """Touvron et al. 2023 (arXiv 2307.09288): ``[INST] <<SYS>> ... <</SYS>> question [/INST] answer``, each turn in
    bos and eos. A turn's prompt is one text, so that its system message counts for the prompter.

    `after_prompt` is what stands between prompt and answer: nothing where the tokenizer puts a space before a text.
    """

    bos: int
    eos: int
    after_prompt: str = ""
    control_tokens: frozenset[str] = frozenset()

    def render(self, messages: Sequence[Message]) -> list[Part]:
        system = ""
        if messages[0].role is Role.SYSTEM:
            system, messages = f"<<SYS>>\n{messages[0].content.strip()}\n<</SYS>>\n\n", messages[1:]
        parts: list[Part] = []
        for number, (role, text) in enumerate(messages):
            if role is not (Role.ASSISTANT if number % 2 else Role.PROMPTER):
                raise DataError(
                    "user and assistant must take turns, after at most one system message, with --chat_template "
                    f"llama2, and message {number} is the {role.name.lower()}'s; repair the line, or use another "
                    "template."
                )
            if role is Role.PROMPTER:
                prompt = f"[INST] {system if number == 0 else ''}{text.strip()} [/INST]"
                parts += [Part(role, self.bos), Part(role, prompt)]
            else:
                parts += [Part(role, f"{self.after_prompt}{text.strip()} "), Part(role, self.eos)]
        return parts


@dataclass(frozen=True)
class Llama3:
    """Meta's Llama 3 chats: a header with the speaker's name, the text, ``<|eot_id|>``; the assistant's own header is
    given to it, so that it counts for the prompter."""

    bos: int
    start_header: int
    end_header: int
    end_of_turn: int
    control_tokens: frozenset[str] = frozenset(
        {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    )

    def render(self, messages: Sequence[Message]) -> list[Part]:
        parts = [Part(_given_by(messages[0].role), self.bos)]
        for role, text in messages:
            name = {Role.SYSTEM: "system", Role.PROMPTER: "user", Role.ASSISTANT: "assistant"}[role]
            header = (self.start_header, name, self.end_header, "\n\n")
            parts += [Part(_given_by(role), content) for content in header]
            parts += [Part(role, text.strip()), Part(role, self.end_of_turn)]
        return parts


def _given_by(role: Role) -> Role:
    return Role.PROMPTER if role is Role.ASSISTANT else role


def control_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    """Every token that `tokenizer`, built to parse special tokens, finds by its name."""
    encoded = {name: tokenizer.encode(name) for name in sorted(tokenizer.literals)}
    return {name: ids[0] for name, ids in encoded.items() if len(ids) == 1}


def require_controls(template: str, names: Sequence[str], controls: Mapping[str, int]) -> list[int]:
    """The ids of `names`. Raises ConfigError for one that the tokenizer does not have."""
    missing = [name for name in names if name not in controls]
    if missing:
        raise ConfigError(
            f"--chat_template {template} needs the token {missing[0]}, which the tokenizer does not have; add it with "
            f'--vocab_extra_ids_list "{",".join(missing)}", here and in finetune.py, or use another template.'
        )
    return [controls[name] for name in names]


def build_template(
    name: str, tokenizer: Tokenizer, controls: Mapping[str, int], role_names: tuple[str, str, str]
) -> ChatTemplate:
    """The template "chatml", "llama2" or "llama3" for a tokenizer. Raises ConfigError where it lacks a token."""
    if name == "chatml":
        start, end = require_controls(name, ["<|im_start|>", "<|im_end|>"], controls)
        return ChatML(start, end, role_names)
    if name == "llama3":
        names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        bos, start_header, end_header, end_of_turn = require_controls(name, names, controls)
        return Llama3(bos, start_header, end_header, end_of_turn)
    if tokenizer.bos is None or tokenizer.eos is None:
        raise ConfigError(
            f"--chat_template llama2 needs bos and eos, and the {tokenizer.name} has not both; use another template."
        )
    return Llama2(tokenizer.bos, tokenizer.eos, "" if prepends_space(tokenizer) else " ")


def prepends_space(tokenizer: Tokenizer) -> bool:
    """Whether a text alone has the ids that it has after a space, as with SentencePiece."""
    word = tokenizer.encode("x")
    return tokenizer.encode("] x")[-len(word) :] == word
