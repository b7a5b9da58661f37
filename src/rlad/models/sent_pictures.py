"""Prompts with pictures for vLLM's server.

Its route for token ids also takes pictures. It needs one placeholder for each, expands it with the
model's own processor, and reports the ids that it has read, which must equal ours.
"""

from collections.abc import Sequence
from typing import Any

from rlad.errors import RunFailedError
from rlad.models.pictures import PicturedPrompt
from rlad.models.vision import Vision


def with_pictures(
    prompt: PicturedPrompt, completion: Sequence[int], vision: Vision
) -> dict[str, Any]:
    """Return the request fields for a prompt with its pictures, and the tokens after it."""
    token = vision.placeholder_ids[0]
    ids: list[int] = []
    rest = list(prompt)
    for picture in prompt.pictures:
        # The placeholders of a picture, with the marks around and between them.
        own = vision.ids_of(picture)
        start = _find(own, rest)
        ids += [*rest[:start], token]
        rest = rest[start + len(own) :]
    parts = [{"type": "image_url", "url": one.whole_url()} for one in prompt.pictures]
    return {
        "token_ids": [*ids, *rest, *completion],
        "content_parts": parts,
        "return_token_ids": True,
    }


def require_same_ids(answer: dict[str, Any], tokens: Sequence[int], url: str) -> None:
    """Raise `RunFailedError` unless a server has read these ids."""
    read = answer.get("prompt_token_ids")
    if read != list(tokens):
        number = len(read) if isinstance(read, list) else "no"
        raise RunFailedError(
            f"{url} read {number} tokens of a prompt with pictures, but the student's processor "
            f"makes {len(tokens)}, or others; serve a model with the student's processor."
        )


def _find(part: Sequence[int], whole: Sequence[int]) -> int:
    """Return the index of the first occurrence."""
    size = len(part)
    for start in range(len(whole) - size + 1):
        if list(whole[start : start + size]) == list(part):
            return start
    raise RunFailedError(
        "a prompt holds a picture in other tokens than its processor makes of it alone, so it "
        "cannot be sent to a server; take a teacher of type 'local', or rollout.engine = 'native'."
    )
