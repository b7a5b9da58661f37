"""What an answer denies: `20, not 30` gives 20, and `it cannot be 5` gives nothing."""

import re

_DENIED_VALUE = re.compile(
    r"[,;]?\s*\b(?:but |and )?(?:not|instead of|rather than|no longer)\s+(?=[^\s\w]{0,3}\s?[0-9])"
    r"(?:(?!\bbut\b)[^,;=]|,(?=[0-9]{3}))*+",
    re.IGNORECASE,
)
_CHOSEN_AFTER = re.compile(r"\s*,?\s*but\b.*[0-9]", re.IGNORECASE | re.DOTALL)
# After these words, or a relation, `not` belongs to the statement.
_STATEMENT_BEFORE = re.compile(
    r"(?:\b(?:is|are|was|were|be|do|does|did|can|could|will|would|should|must|may|has|have|and|or)"
    r"|[<>=]|\\[lg]e|\\in)\s*$",
    re.IGNORECASE,
)
_RELATION = re.compile(r"[<>]|\\(?:[lg]e|in)(?![A-Za-z])")
_BEFORE_A_NUMBER = re.compile(
    r"\b(?:not|never|cannot|neither|nor|except|excluding|wrong|incorrect|false|no longer|instead of"
    r"|rather than|(?:anything|everything|all) but|other than|impossible|unlikely)\b|n't\b",
    re.IGNORECASE,
)
_AFTER_A_NUMBER = re.compile(
    r"\b(?:wrong|incorrect)\b|^\W*(?:(?:is|was|are|were|be|would be)\s+)?(?:not\b|never\b|false\b)"
    r"|^\W*\w+n't\b",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[.,;]\s")
_LAST_NUMBER = re.compile(r"[0-9](?=[^0-9]*$)")


def without_denied_values(text: str) -> str:
    """Take away what `not`, `instead of` or `rather than` denies beside a value that is given."""

    def kept(match: re.Match[str]) -> str:
        before, after = text[: match.start()], text[match.end() :]
        is_given = any(map(str.isdigit, before)) and not _RELATION.search(before)
        is_statement = bool(_STATEMENT_BEFORE.search(before))
        is_denied = _CHOSEN_AFTER.match(after) or (is_given and not is_statement)
        return " " if is_denied else match[0]

    return _DENIED_VALUE.sub(kept, text)


def is_denied(text: str, *, is_marked: bool = True) -> bool:
    """Say whether a text denies the number that it gives; of prose, its last clause with one."""
    number = _LAST_NUMBER.search(text)
    if number is None:
        return False
    before, after = text[: number.start()], text[number.end() :]
    if not is_marked:
        before = _CLAUSE_END.split(before)[-1]
    return bool(_BEFORE_A_NUMBER.search(before) or _AFTER_A_NUMBER.search(after))
