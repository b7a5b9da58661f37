"""Make the prompt text of a problem with pictures, with the model's placeholders."""

from collections.abc import Sequence
from typing import Any

from rlad.errors import UserError
from rlad.models.pictures import MARKER
from rlad.models.vision import Vision

Message = tuple[str, str]


def with_markers(messages: Sequence[Message], num_pictures: int) -> list[Message]:
    """Return a conversation with a marker for each picture: the markers in the text or, if there
    are none, new ones before the last message. Raises `UserError` for a wrong number of markers."""
    number = sum(content.count(MARKER) for _, content in messages)
    if number == num_pictures:
        return list(messages)
    if number:
        raise UserError(
            f"a problem has {num_pictures} pictures but its text has {number} times {MARKER!r}; "
            "write it once at the position of each picture, or not at all: then they come first."
        )
    *before, (role, content) = messages
    return [*before, (role, MARKER * num_pictures + "\n" + content)]


def require_no_placeholder(text: str, vision: Vision) -> None:
    """Raise `UserError` for a problem whose own text contains a placeholder of the model, for
    pictures, films or sound."""
    for token in vision.placeholders:
        if token != MARKER and token in text:
            raise UserError(
                f"a problem's own text holds {token!r}, a placeholder of {vision.name!r}; write "
                f"{MARKER!r} where a picture belongs, or take it out."
            )


def plain_text_with_pictures(text: str, vision: Vision) -> str:
    """Replace the markers by the model's placeholders."""
    return text.replace(MARKER, vision.wrapped_token)


def content_parts(content: str) -> list[dict[str, str]]:
    """Split a message at its markers, into the parts that chat templates of vision models take."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(MARKER)):
        if number:
            parts.append({"type": "image"})
        if text.strip():
            parts.append({"type": "text", "text": text.strip() if number else text})
    return parts


def chat_text_with_pictures(
    messages: Sequence[Message],
    vision: Vision,
    variables: dict[str, Any],
    num_pictures: int,
    *,
    template: str,
) -> str:
    """Format a conversation with a chat template.

    Templates take a message in parts or as one text. The first form that keeps every picture and
    every text in the prompt is used. Raises `UserError` if neither does.
    """
    ways: list[list[dict[str, Any]]] = [
        [{"role": role, "content": content_parts(content)} for role, content in messages],
        [
            {"role": role, "content": plain_text_with_pictures(content, vision)}
            for role, content in messages
        ],
    ]
    texts = [part for _, content in messages for part in content.split(MARKER) if part.strip()]
    failure = "it leaves out a picture, or a text"
    for way in ways:
        try:
            written = str(
                vision.tokenizer.apply_chat_template(
                    way,
                    tokenize=False,
                    add_generation_prompt=True,
                    chat_template=template,
                    **variables,
                )
            )
        except Exception as error:  # a template is a program of its own
            failure = str(error)
            continue
        is_whole = all(part.strip() in written for part in texts) and "'type'" not in written
        if is_whole and written.count(vision.token) == num_pictures:
            return written
    raise UserError(
        f"the chat template of {vision.name!r} takes no pictures ({failure}); fix it, or set "
        "rollout.prompt_format = 'plain'."
    )
