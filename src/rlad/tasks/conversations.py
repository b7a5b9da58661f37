"""Prompts that are conversations: how they are read from a file, shown and compared."""

import json
from typing import Any

from rlad.errors import UserError
from rlad.tasks.base import Conversation


def conversation(value: list[Any], where: str) -> Conversation:
    """Read the messages of a prompt.

    Raises `UserError` that begins with `where` unless they are a conversation that a model can
    answer: texts, a system message at most as the first, the user's as the last.
    """
    messages = tuple(
        _message(message, f"{where}, message {number},")
        for number, message in enumerate(value, start=1)
    )
    roles = [role for role, _ in messages]
    if roles[-1:] != ["user"] or "system" in roles[1:]:
        raise UserError(
            f"{where} has messages of {', '.join(roles) or 'nobody'}; put the system's, if there "
            "is one, first and the user's last, as it is the model that answers (the reference "
            "answer has a field of its own)."
        )
    return messages


def _message(message: Any, where: str) -> tuple[str, str]:
    # Roles and contents that no chat template can show are refused here, where the line is known.
    match message:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)} if (
            content.strip()
        ):
            require_text(content, where)
            return role, content
    came = json.dumps(message, default=str)[:80]
    raise UserError(
        f'{where} is {came}; write {{"role": ..., "content": ...}} with a role among system, user, '
        "assistant and a text that is not empty."
    )


def require_text(value: str, where: str) -> None:
    """Raise `UserError` that begins with `where` for half of a surrogate pair."""
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where} has half of a surrogate pair, which is no text; remove it.")


def shown(messages: Conversation) -> str:
    """Show a conversation: the user's message alone as it is, others after their roles."""
    if [role for role, _ in messages] == ["user"]:
        return messages[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in messages)


def asked_text(messages: Conversation) -> str:
    """Show what is asked, without the system message: one question under two of them is one
    question."""
    return shown(tuple(message for message in messages if message[0] != "system"))
