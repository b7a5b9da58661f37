"""Text around a number that changes its meaning: signs (`x_5`, `f(5)`, `5!`) and words (`half of
5`, `5 does not work`, `5 or six`)."""

import re
import unicodedata

from rlad.tasks.denials import is_plain_predicate, is_refused_after
from rlad.tasks.notation import words
from rlad.tasks.units import LARGE_NUMBERS, MULTIPLIERS, known_unit

_WORD = re.compile(r"[^\W\d_]+(?:[-'.][^\W\d_]+)*\.?")
# Words that change the number next to them.
CHANGING_WORDS = frozenset(
    words(
        "sqrt root pi squared cubed factorial mod modulo base half halves third thirds "
        "quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth "
        "eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths times "
        "plus minus over power divided multiplied point remainder r am pm a.m a.m. p.m p.m. "
        "o'clock log lg ln sin cos tan sinh cosh tanh exp recurring repeating repeated choose"
    )
) | set(LARGE_NUMBERS)
_CHANGING_AFTER = CHANGING_WORDS | {"negative", "below"}
_NUMBER_WORDS = frozenset(
    words(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
    )
)
# In prose these are one of the last words before a number.
_CHANGING_BEFORE = frozenset(
    words(
        "lg sub sqrt root half third quarter twice double triple thrice quadruple times over power "
        "mod modulo base point log ln sin cos tan exp factorial pi version room than"
    )
)
# The number after these words and "of" is not the value itself.
_CHANGING_BEFORE_OF = frozenset(
    words(
        "half third quarter fifth tenth root square cube opposite reciprocal inverse negative "
        "negation complement conjugate multiple multiples factor factors divisor divisors power "
        "powers log logarithm twice thrice double triple percent percentage fraction successor "
        "predecessor digit digits base modulus floor ceiling out instead most"
    )
)
# A marked answer after these words is one of several, or depends on a condition.
_CONDITIONS = frozenset(words("if unless either whether between suppose assuming doubt neither"))
_JOINING = frozenset(words("and or nor without within before after past until except versus vs"))
# Words that a marked answer with one number does not have: they give another answer or none.
_ANOTHER = frozenset(
    words(
        "but unless if wait scratch sorry actually hmm rejected extraneous invalid fails too "
        "impossible nope rather alternatively maybe perhaps possibly or otherwise else assuming "
        "except iff provided respectively resp versus vs xor"
    )
)
_DOUBTS = frozenset(
    words(
        "rejected extraneous invalid impossible possible fails maybe perhaps possibly no guess "
        "guessing not"
    )
)
_NO = re.compile(r"\bno\b(?! (?:more|less|change|tax|units?)\b)", re.IGNORECASE)
# Verbs and prepositions whose subject or first part is a number.
_VERBS = frozenset(
    words(
        "does do did has have had can could will would should must may might cannot seems looks "
        "if unless when whenever where from into by until till before after past under above "
        "short minus pick permute"
    )
)
_IS_THE_ANSWER = re.compile(
    r"\W*(?:is|was)\s+(?:(?:the|my|our|its|his|her|what|exactly)\s+)?(?:(?:final|correct|right|only|exact"
    r"|total|smallest|largest|minimum|maximum|least|greatest|required|desired)\s+)*(?:answer|result"
    r"|solution|value|number|total|sum|amount|one|correct|right|left|needed|required|remaining"
    r"|integer|count)\b(?! of the (?:answers|results|solutions|values|numbers)\b)",
    re.IGNORECASE,
)
# Statements about what people do are everyday language; "x is even" and "n > 0" restrict an answer.
_PERSON = r"(?:he|she|they|we|you|(?!The|It|That|This)[A-Z][a-z]{2,})"
_EVERYDAY_CONDITION = re.compile(
    rf"^\W*[Ii]f\s+{_PERSON}\s+(?!(?:is|are|was|were|has|have|had|does|did)\b)[a-z]{{3,}}(?:\s+(?!(?:not"
    r"|never|no|none|nothing|only|even|odd|if|or|else|unless|either|whether|between)\b)[a-z]{2,})*"
    rf",\s+(?:then\s+)?(?:it|{_PERSON})\s+(?:(?:each|all|both)\s+)?[a-z]+\s\W*$"
)
_BETWEEN_PEOPLE = re.compile(
    r"\b[Bb]etween (?:them|us|you|the (?:two|three|four|five|six)(?: of (?:them|us|you))?),"
)
# A thing named before "is": the number of people in the room is 5.
_NAMED_THING = re.compile(
    r"\b(?:of|in|on|at|for|from|to|by)\s+(?:the|an?|his|her|its|their|each|this|that)\s+(?:[a-z]+\s+)?"
    r"(?:room|base|power|third|half|quarter|point|version)\s+(?:[a-z]+\s+)?(?:is|was|are|were|equals)"
    r"\W*$",
    re.IGNORECASE,
)
_CAN_BE_DONE = re.compile(
    r"(?:\s+[a-z]+)?\s+(?:can|could|will) be (?:bought|sold|built|filled|baked"
    r"|packed|served|eaten|read|seated|produced|planted|carried|fed|painted|saved|formed"
    r"|finished|shared)\b",
    re.IGNORECASE,
)
_HAS = re.compile(
    r"\b(?:has|have|had|gets?|got|makes?|made|bought|buys?|sells?|sold|needs?|ate|eats?|pays?|paid|earns?"
    r"|takes?|took|gives?|gave|reads?|spends?|spent|saves?|saved|receives?|uses?|used)\W*$"
)
_TOO_AT_END = re.compile(r"^((?:\s+[a-z]+){1,3}),?\s+too(?=\W*$)")
_WITH_NUMBER_WORD = re.compile(
    r"(?:\b(?:to|past|till|until|by|from|into|or|of|and|also)\s+|[,;]\s*)"
    rf"(?:{'|'.join(sorted(_NUMBER_WORDS))})\b|\b(?:to the|per) [b-z]\b"
    # the number to be squared
    r"|\bbe\s+(?:squar|cub|doubl|tripl|halv|negat|revers)ed\b",
    re.IGNORECASE,
)
HOW_OFTEN = re.compile(
    r"^\W*times(?=\W*$|\s+(?:an?|per|each|every)\s+(?:second|minute|hour|day"
    r"|night|week|month|year)s?\b)",
    re.IGNORECASE,
)
_THAN = re.compile(r"\W*(?:less|more|fewer|greater|smaller|larger)\s+than\s+(?![A-Z][a-z])")
# The only signs that may be between the last word before a number and the number.
_IDLE_SIGNS = re.compile(
    r"(?:[\s.,:;'\"(\[{}\])#~%\N{EM DASH}\N{EN DASH}\N{BULLET}]|(?<!\S)(?:[*`]|_(?!\{))+|!(?=\s)"
    r"|(?<![^\s(])[A-Ea-eI](?=[).:\s]))*"
)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![\w-])")
_PUNCTUATION = frozenset(" \t\"'()[]{}*_`#,.;:~|%\N{EM DASH}\N{EN DASH}")
_LAST_WORD = re.compile(r"[^\W\d_]{2,}(?!.*[^\W\d_]{2})", re.DOTALL)


def words_of(text: str) -> list[str]:
    """List the words of a text, in their original case."""
    return _WORD.findall(text)


def begins_before(before: str, *, is_marked: bool) -> bool:
    """Return whether the text before a number belongs to it: x3, 2^3, 1.2.3, x < 3, 1 + 3, half of
    3."""
    # Emphasis is removed before, so an underscore is an index, and a comma may be a decimal point.
    if re.search(r"_$|(?<!\w)[,;]\s*$", before):
        return True
    if before[-1:].isalnum() or re.search(r"[A-Za-z][-.]$|\\[A-Za-z]", before):
        return True
    last = _LAST_WORD.search(before)
    tail = before[last.end() :] if last else before
    if not _are_idle_signs(tail):
        return True
    # "(" after a letter belongs to a function, and a comma to a list.
    if last and re.match(r"[(\[{_*]", tail):
        return True
    if before and unicodedata.category(before[-1]) == "Pd":
        return True
    found = [word.casefold() for word in words_of(before)]
    if is_marked and _is_conditional(before):
        return True
    found = found[-3:]
    is_of = found[-1:] == ["of"]
    if not _NAMED_THING.search(before) and set(found) & _CHANGING_BEFORE:
        return True
    if is_of and set(found) & _CHANGING_BEFORE_OF:
        return True
    if not found or "(" in tail:
        return False
    is_number_word = found[-1] in MULTIPLIERS or found[-1] in _NUMBER_WORDS
    is_joined = found[-1] in _JOINING and found not in (["and"], ["or"])  # 5 and 5
    return is_joined or is_number_word


def _is_conditional(before: str) -> bool:
    """Return whether a marked answer is one of several, or depends on a condition."""
    if _EVERYDAY_CONDITION.match(before):
        return False
    found = words_of(_BETWEEN_PEOPLE.sub(" ", before))
    return bool({word.casefold() for word in found} & _CONDITIONS)


def without_too(before: str, after: str) -> str:
    """Remove `too` at the end of a sentence about someone: Tom has 5 apples too."""
    return _TOO_AT_END.sub(r"\1", after) if _HAS.search(before) else after


def _are_idle_signs(tail: str) -> bool:
    rest = tail[_IDLE_SIGNS.match(tail).end() :] if tail else ""  # pyright: ignore
    is_apart = not rest or rest[-1].isspace()
    return is_apart and all(unicodedata.category(c) == "So" or c.isspace() for c in rest)


def ends_behind(after: str, *, is_marked: bool) -> bool:
    """Return whether the text after a number belongs to it: 3x, 3!, 3^2, 3 + 1, 3 and a half."""
    if after[:1] in tuple("_^!?/\\+<>") or re.match(r"[-'][^\W_]", after):
        return True
    attached = re.match(r"[^\W\d_]+", after)
    if attached and _ORDINAL.match(after) is None and not _is_unit(attached[0]):
        return True
    rest = after[attached.end() if attached else 0 :]
    if not set(_WORD.sub("", rest).replace("/", "")) <= _PUNCTUATION | set("-\n"):
        return True
    if re.match(r"\s*[-*/|]", rest) or re.search(r"[*|]", rest):
        return True
    found = words_of(after)
    first = found[0] if found else ""
    is_variable = len(first) == 1 and known_unit(first) is None and first not in ("a", "A")
    return is_variable or changes_before(after) or (is_marked and _gives_another(after))


def _is_unit(attached: str) -> bool:
    # 5K is five thousand.
    is_letter = len(attached) == 1 and attached.isupper() and attached != "L"
    return known_unit(attached) is not None and not is_letter


def changes_before(after: str) -> bool:
    """Return whether the words after a number or a unit change it: squared, million, less than x,
    does not work."""
    found = [word.casefold() for word in words_of(HOW_OFTEN.sub("", after))]
    if set(found[:3]) & _CHANGING_AFTER or _THAN.match(after) or is_refused_after(after):
        return True
    is_asked_for = _IS_THE_ANSWER.match(after) or is_plain_predicate(after)
    is_claim = found[:1] in (["is"], ["was"]) and not is_asked_for
    is_verb = set(found[:1]) & _VERBS and not _CAN_BE_DONE.match(after)
    return bool(is_claim or is_verb or _WITH_NUMBER_WORD.search(after))


def _gives_another(after: str) -> bool:
    return bool(set(gives_another_words(after))) or _NO.search(after) is not None


def gives_another_words(text: str) -> set[str]:
    """List the words that give another answer or none: or, but, rejected, six."""
    found = [word.casefold().rstrip(".") for word in words_of(re.sub(r"\bor so\b", "", text))]
    return set(found) & _ANOTHER | set(found[:1]) & _NUMBER_WORDS


def is_another_remark(remark: str) -> bool:
    """Return whether a remark in brackets after an answer takes it back or gives another one: (if
    x > 0), (rejected), (or six). (five) only repeats it."""
    found = [word.casefold().rstrip(".") for word in words_of(remark)]
    if found[:1] and found[0] in _NUMBER_WORDS:
        return bool(set(found[1:]) & (_ANOTHER | _DOUBTS))
    return bool(
        changes_before(remark)
        or set(found) & _DOUBTS
        or (len(found) > 1 and set(found) & (_ANOTHER | _NUMBER_WORDS))
        or {"only", "when"} <= set(found)
    )
