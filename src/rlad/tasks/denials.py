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
    r"|rather than|(?:anything|everything|all) but|other than|impossible|unlikely|doubt|mistake"
    r"|no way)\b|n't\b",
    re.IGNORECASE,
)
_AFTER_A_NUMBER = re.compile(
    r"\b(?:wrong|incorrect)\b|^\W*(?:(?:is|was|are|were|be|would be)\s+)?(?:not\b|never\b|false\b)"
    r"|^\W*\w+n't\b",
    re.IGNORECASE,
)
# How a line begins that takes back the answer before it, or offers another one.
_TAKEN_BACK = re.compile(
    r"(?:[^\w\n]|_)*((?:no|nope)(?=\s*[^\w\s])|(?:(?:no,? )?wait|actually|correction|scratch|sorry"
    r"|oops|never ?mind|alternatively|hmm+|rather|instead|on second thoughts?|maybe|perhaps|however"
    r"|but(?! note)|or(?! equivalently)|my mistake|edit|not \S+ but"
    r"|another (?:answer|solution|option|possibility|value)"
    r"|i (?:was wrong|made an?|have made an?|meant|take)"
    r"|(?:that|this|it|which) (?:is|was) (?:not|wrong|incorrect|false|impossible))\b)",
    re.IGNORECASE,
)
_SENTENCE_CONTINUED = re.compile(
    r"\W*(?:if|unless|except|provided|assuming|is|are|was|were|and|than|minus|plus|times)\b"
)
# What refuses the value directly after it, or before it.
_REFUSED_BEFORE = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|no longer|instead of|rather than|other than|except"
    r"|excluding|(?:any|every|no)(?:thing|one) but|all but|none but|wrong|incorrect|false"
    r"|impossible|unlikely|doubt|doubtful|mistake|mistakenly|might think|no way)|n't)"
    r"(?:\s+(?:be|is|are|was|were|will|would|could|can|must|should|equal|equals|to|the"
    r"|an?|answer|result|value|number|solution|really|actually|exactly|just|about|for|that|it|as|x"
    r"|=))*\s*:?\s*$",
    re.IGNORECASE,
)
_REFUSED_AFTER = re.compile(
    r"\W*[\N{CROSS MARK}\N{BALLOT X}\N{HEAVY BALLOT X}]"
    r"|[^\w,;.]*(?:(?:which|that|it|this)\s+)?(?:(?:is|are|was|were|be|would be|seems|looks)\s+"
    r"(?:not|never|no|too|wrong|incorrect|false|impossible|invalid|rejected|extraneous|excluded"
    r"|ruled out|an? (?:mistake|typo|guess|lower|upper|bound|wrong|contradiction))"
    r"|cannot|fails|(?:does|do|did|can|could|will|would|should) not|never|\w+n't|wrong|incorrect"
    r"|false|rejected|extraneous|invalid|scratch)\b",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[.,;]\s")
_LAST_NUMBER = re.compile(r"[0-9](?=[^0-9]*$)")


def is_refused_before(text: str) -> bool:
    """Say whether a text refuses the value that directly follows it: `anything but`."""
    return _REFUSED_BEFORE.search(text) is not None


def is_refused_after(text: str) -> bool:
    """Say whether a text refuses the value that is directly before it: `is wrong`."""
    return _REFUSED_AFTER.match(text) is not None


def is_struck(text: str) -> bool:
    """Say whether markdown or LaTeX strikes something of a text out."""
    return re.search(r"~~\S|\\[bx]?cancel(?![A-Za-z])|\\sout(?![A-Za-z])", text) is not None


def is_taken_back(remarks: str) -> bool:
    """Say whether the lines after an answer take it back, offer another one or continue its
    sentence."""
    lines = [line for line in remarks.splitlines() if line.strip()]
    if not lines or _SENTENCE_CONTINUED.match(lines[0]):
        return bool(lines)
    found = [_TAKEN_BACK.match(line) for line in lines]
    # In lower case a later line only continues the one before it.
    return any(match and (i == 0 or match[1][0].isupper()) for i, match in enumerate(found))


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
