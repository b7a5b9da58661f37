"""Which tokens of a completion say what is seen, and which think: between the tags `<perception>`
and `<reasoning>`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NO_ROLE = 0
ROLES = {"perception": 1, "reasoning": 2}
"""number of each role"""
_PARTS = {name: re.compile(rf"<{name}>(.*?)</{name}>", re.DOTALL) for name in ROLES}


@dataclass(frozen=True, slots=True)
class RoleSpans:
    """Where the tokens of each role are in a completion: from the first to after the last one."""

    perception: range
    reasoning: range
    reasoning_opens: int
    """the token with which the tag `<reasoning>` begins"""


def role_spans(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> RoleSpans | None:
    """Find the roles in a completion; None where it has not each part once, in this order.

    A token that holds a part of a tag is the tag's. `decode` gives the text of token ids, tags
    included; but for a character at its end that is not whole, it may only grow with more tokens.
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
        """The first token that begins at a character of the text or after it."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high) // 2
            # A character whose bytes are not all there yet is not one, or is several.
            if len(decode(ids[:middle]).rstrip("\ufffd")) >= character:
                high = middle
            else:
                low = middle + 1
        return low

    def holding(character: int) -> int:
        """The token that holds a character of the text."""
        return first_at(character + 1) - 1

    spans = [
        range(first_at(match.start(1)), holding(match.end(1))) for match in (perception, reasoning)
    ]
    if not all(spans):
        return None
    return RoleSpans(spans[0], spans[1], holding(reasoning.start()))
