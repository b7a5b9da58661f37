"""Denials in answers: `20, not 30` gives 20, and `it cannot be 5` gives nothing."""

import re

from rlad.tasks.notation import words

_DENIED_VALUE = re.compile(
    r"[,;]?\s*\b(?:but |and )?(?:not|instead of|rather than|no longer)\s+(?=[^\s\w]{0,3}\s?[0-9])"
    r"(?:(?!\bbut\b)[^,;=]|,(?=[0-9]{3}))*+",
    re.IGNORECASE,
)
_CHOSEN_AFTER = re.compile(r"\s*,?\s*but\b.*[0-9]", re.IGNORECASE | re.DOTALL)
# After these words or a relation, `not` is part of the statement.
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
# Beginnings of lines that take back the answer before them, or offer another one.
_TAKEN_BACK = re.compile(
    r"(?:[^\w\n]|_)*((?:no|nope)(?=\s*[^\w\s])|(?:(?:no,? )?wait|correction|scratch|oops"
    r"|never ?mind|hmm+|actually|rather|instead|sorry(?! (?:for|about|if|that)\b)"
    r"|on second thoughts?|or(?! equivalently)|my mistake|edit|not \S+ but"
    r"|another (?:answer|solution|option|possibility|value)"
    r"|i (?:was wrong|made an?|have made an?|meant|take)"
    r"|(?:that|this|it|which) (?:is|was) (?:not|wrong|incorrect|false|impossible))\b)",
    re.IGNORECASE,
)
# Beginnings of lines that do so unless they only describe the way to the answer.
_CONTRASTED = re.compile(
    r"(?:[^\w\n]|_)*((?:sorry (?:for|about|if|that)|alternatively|maybe|perhaps|however"
    r"|but(?! note))\b)",
    re.IGNORECASE,
)
_OF_THE_WAY = frozenset(
    words(
        "faster shorter simpler easier quicker nicer elegant way ways method methods approach "
        "formula triangles theorem algebra geometry calculus induction symmetry explanation "
        "explanations proof argument detail details long picture diagram graph"
    )
)
_OF_AN_ANSWER = frozenset(
    words(
        "zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty "
        "fifty hundred thousand million dozen infinity pi root roots answer answers result "
        "results solution solutions value values number total sum correct incorrect wrong right "
        "true false mistake mistakes mistaken error errors typo sure certain unsure unclear check "
        "misread missed forgot overlooked ignored case cases impossible contradiction contradicts "
        "fails failed not never no none neither nor cannot valid invalid extraneous rejected "
        "knight knights knave knaves must should instead rather negative minus twice double half "
        "again let wait only if unless or depends works work guess doubt other different differs "
        "sign larger smaller bigger less gives give gave yields get means"
    )
)
_SIGN = re.compile(r"[0-9$\\=]|n't\b|(?<!['\w])[b-zB-HJ-Z](?!\w)")
_SENTENCE_BEGINS = re.compile(r"[.!?]\s(?:Just|Please|Feel|Thanks?|The|This|Hope|Here|We|You)\b")
_SENTENCE_CONTINUED = re.compile(
    r"\W*(?:if|unless|except|provided|assuming|than|minus|plus|times)\b"
)
_AND_DONE = re.compile(
    r"\W*and\s+(?:(?:so|thus|hence|therefore)\s+)?(?:(?:we|i) (?:are|am)|we're|i'm"
    r"|(?:the|our|this|that)(?: \w+)? (?:is|concludes|completes|proves|finishes|ends))\s+(?:now )?"
    r"(?:done|finished|complete|proven|proved|solved"
    r"|the (?:proof|problem|solution|exercise|argument))[\s.!]*$",
    re.IGNORECASE,
)
_VERB_CONTINUED = re.compile(r"\W*(?:is|was|are|were|and)\b")
_PREDICATE = re.compile(
    r"\W*(?:is|was|are|were)\s+(?:(?:therefore|thus|exactly|indeed)\s+)?(?:the|our|my|his|her|its"
    r"|their|your|what|how (?:many|much|long|far|old))\s+\w",
    re.IGNORECASE,
)
_ANOTHER_SIGN = re.compile(rf"{_SIGN.pattern}|[\^*/+?]")
# With these words, "is the ..." describes something else than what was asked for.
_ANOTHER_THING = frozenset(
    words(
        "not never no none neither nor or but if unless except only when whenever wrong incorrect "
        "false impossible invalid bound limit guess candidate mistake error typo contradiction "
        "problem reason case other next previous opposite one two three four five six seven eight "
        "nine ten second third fourth half quarter part twice double triple than minus plus times "
        "divided multiplied added subtracted subtract add divide multiply squared cubed doubled "
        "halved answers roots solutions values digit also maybe perhaps possibly probably "
        "extraneous rejected excluded"
    )
)
_ANOTHER_OF = re.compile(
    r"\b(?:square|cube|root|inverse|reciprocal|negative|multiple|factor|divisor|power|logarithm"
    r"|base|fraction|log|exponent|complement|percentage|remainder) (?:of|for)\b",
    re.IGNORECASE,
)
# Words that deny the value directly after or before them.
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
    """Return whether a text denies the value directly before it: `is wrong`."""
    return _REFUSED_AFTER.match(text) is not None


def is_struck(text: str) -> bool:
    """Return whether markdown or LaTeX strikes out a part of a text."""
    return re.search(r"~~\S|\\[bx]?cancel(?![A-Za-z])|\\sout(?![A-Za-z])", text) is not None


def is_taken_back(remarks: str) -> bool:
    """Return whether the lines after an answer take it back, offer another one or continue its
    sentence."""
    lines = [line for line in remarks.splitlines() if line.strip()]
    if not lines or _SENTENCE_CONTINUED.match(lines[0]):
        return bool(lines)
    is_harmless = _AND_DONE.match(lines[0]) or is_plain_predicate(lines[0])
    if _VERB_CONTINUED.match(lines[0]) and not is_harmless:
        return True
    found = [_TAKEN_BACK.match(line) or _contrast(line) for line in lines]
    # A later line in lower case only continues the line before it.
    return any(match and (i == 0 or match[1][0].isupper()) for i, match in enumerate(found))


def _contrast(line: str) -> re.Match[str] | None:
    """Match a line such as `However, ...` unless it only describes the way to the answer."""
    match = _CONTRASTED.match(line)
    if match is None:
        return None
    rest = line[match.end() :]
    found = re.findall(r"[^\W\d_]+", _SENTENCE_BEGINS.sub(" ", rest))
    has_name = any(word[0].isupper() and word != "I" for word in found)
    is_open = rest.rstrip(" *_`\"'").endswith((":", ","))
    said = {word.casefold() for word in found}
    is_of_the_way = said & _OF_THE_WAY and not said & _OF_AN_ANSWER and not _SIGN.search(rest)
    return None if is_of_the_way and not has_name and not is_open else match


def is_plain_predicate(text: str) -> bool:
    """Return whether a text begins by naming the value before it as what was asked for, such as `is
    his age`."""
    said = re.split(r"[.!](?:\s|$)", text, maxsplit=1)[0]
    if _PREDICATE.match(said) is None or _ANOTHER_SIGN.search(said) or _ANOTHER_OF.search(said):
        return False
    return not {word.casefold() for word in re.findall(r"[^\W\d_]+", said)} & _ANOTHER_THING


def without_denied_values(text: str) -> str:
    """Remove values that are denied by `not`, `instead of` or `rather than` if another value is
    given."""

    def kept(match: re.Match[str]) -> str:
        before, after = text[: match.start()], text[match.end() :]
        is_given = any(map(str.isdigit, before)) and not _RELATION.search(before)
        is_statement = bool(_STATEMENT_BEFORE.search(before))
        is_denied = _CHOSEN_AFTER.match(after) or (is_given and not is_statement)
        return " " if is_denied else match[0]

    return _DENIED_VALUE.sub(kept, text)


def is_denied(text: str, *, is_marked: bool = True) -> bool:
    """Return whether a text denies the number that it gives. In prose only the last clause with a
    number counts."""
    number = _LAST_NUMBER.search(text)
    if number is None:
        return False
    before, after = text[: number.start()], text[number.end() :]
    if not is_marked:
        before = _CLAUSE_END.split(before)[-1]
    return bool(_BEFORE_A_NUMBER.search(before) or _AFTER_A_NUMBER.search(after))
