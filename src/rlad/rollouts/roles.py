"""Find the tokens of a completion's perception and reasoning, inside the tags `<perception>` and
`<reasoning>`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NO_ROLE = 0
ROLES = {"perception": 1, "reasoning": 2}
"""The number of each role."""
_PARTS = {name: re.compile(rf"<{name}>(.*?)</{name}>", re.DOTALL) for name in ROLES}


@dataclass(frozen=True, slots=True)
class RoleSpans:
    """The token span of each role in a completion: from the first token to after the last."""

    perception: range
    reasoning: range
    reasoning_opens: int
    """index of the token at which the tag `<reasoning>` begins"""


def role_spans(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> RoleSpans | None:
    """Find the roles in a completion; None unless it has each part once, in this order.

    A token that contains a part of a tag belongs to the tag. `decode` returns the text of token
    ids, with tags. With more tokens the text may only grow, except for an incomplete last
    character.
    """
    ids = list(token_ids)
    text = decode(ids)
    found = [pattern.findall(text) for pattern in _PARTS.values()]
    if [len(parts) for parts in found] != [1, 1] or not all(part[0].strip() for part in found):
        return None
    perception, reasoning = (pattern.search(text) for pattern in _PARTS.values())
    assert perception and reasoning
    if perception.end() > reasoning.start():
        return None

    def first_at(character: int) -> int:
        """Return the first token that begins at or after a character of the text."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            # A character whose bytes are incomplete decodes to none, or to several.
            if len(decode(ids[:middle]).rstrip("\ufffd")) >= character:
                high = middle
            else:
                low = middle + 1
        return low

    def holding(character: int) -> int:
        """Return the token that contains a character of the text."""
        return first_at(character + 1) - 1

    spans = [
        range(first_at(match.start(1)), holding(match.end(1))) for match in (perception, reasoning)
    ]
    if not all(spans):
        return None
    return RoleSpans(spans[0], spans[1], holding(reasoning.start()))
