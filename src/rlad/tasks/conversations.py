"""Prompts that are conversations: how they are checked, shown and compared."""

import json
from collections.abc import Iterator
from typing import Any

from rlad.tasks.base import Conversation

_PARTS = (
    "tool_calls", "tool_call_id", "function_call", "reasoning_content", "reasoning", "thinking",
    "name",
)  # fmt: skip
"""parts of a message, besides its content, that a chat template may show"""


def conversation_mistakes(messages: list[Any]) -> Iterator[str]:
    """Yield what is wrong with a prompt's messages. Contents must be texts, only the first message
    may be a system message, and the last must be the user's."""
    roles = []
    for number, message in enumerate(messages, start=1):
        for part in _PARTS:
            if isinstance(message, dict) and message.get(part):
                yield (
                    f"message {number} has {part!r}, which a prompt would leave out; write it into "
                    "the content, or remove it."
                )
        match message:
            case {"role": "system" | "user" | "assistant" as role, "content": str(content)} if (
                content.strip()
            ):
                roles.append(role)
            case _:
                came = json.dumps(message, default=str)[:80]
                yield (
                    f'message {number} is {came}; write {{"role": ..., "content": ...}} with a '
                    "role among system, user, assistant and a text that is not empty."
                )
    if roles[-1:] != ["user"] or "system" in roles[1:]:
        yield (
            f"it has messages of {', '.join(roles) or 'nobody'}; put the system's, if there is "
            "one, first and the user's last, as the model writes the next one (the reference "
            "answer has its own field)."
        )


def shown(messages: Conversation) -> str:
    """Show a conversation as text: a single user message as it is, otherwise each message with its
    role."""
    if [role for role, _ in messages] == ["user"]:
        return messages[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in messages)


def asked_text(messages: Conversation) -> str:
    """Show a conversation without its system message: the same question with two of these is one
    question."""
    return shown(tuple(message for message in messages if message[0] != "system"))
