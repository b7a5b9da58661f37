"""Prompts that are conversations: reading them from a file, showing them, comparing them."""

import json
from typing import Any

from rlad.errors import UserError
from rlad.tasks.base import Conversation

ROLES = ("system", "user", "assistant")


def conversation(value: list[Any], where: str) -> Conversation:
    """The messages of a prompt. `UserError` that begins with `where` unless they are a
    conversation that a model can answer: texts, a system message at most as the first, the user's
    as the last.
    """
    messages = tuple(
        _message(message, f"{where}, message {number},")
        for number, message in enumerate(value, start=1)
    )
    if not messages:
        raise UserError(f"{where} holds no message; write at least the user's.")
    if any(role == "system" for role, _ in messages[1:]):
        raise UserError(f"{where} has a system message that is not its first; put it there.")
    if messages[-1][0] != "user":
        raise UserError(
            f"{where} ends with a message of the {messages[-1][0]}, but it is the model that "
            "answers: end it with the user's, "
            "and give the reference answer in a field of its own."
        )
    return messages


def _message(message: Any, where: str) -> tuple[str, str]:
    is_message = (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
    )
    if not is_message or not message["content"].strip():
        came = json.dumps(message, default=str)[:80]
        raise UserError(
            f'{where} is {came}; write {{"role": ..., "content": ...}} with a role among {", ".join(ROLES)} and a text that is '
            "not empty."
        )
    require_text(message["content"], where)
    return message["role"], message["content"]


def require_text(value: str, where: str) -> None:
    """`UserError` that begins with `where` for half of a surrogate pair."""
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where} has half of a surrogate pair, which is no text; remove it.")


def shown(messages: Conversation) -> str:
    """How a conversation is shown: the user's message alone as it is, others behind their roles."""
    if [role for role, _ in messages] == ["user"]:
        return messages[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in messages)


def asked_text(messages: Conversation) -> str:
    """What is asked, without the system message: one question under two of them is one question."""
    return shown(tuple(message for message in messages if message[0] != "system"))
