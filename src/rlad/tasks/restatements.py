r"""Restatements of an answer, which are not other answers: `10/2, or \boxed{5}`, `300 seconds, or
\boxed{5} minutes`, `$x=5$ ($\boxed{5}$)`; and other answers in the lines after it."""

import re
from fractions import Fraction

from rlad.tasks.notation import plain_notation, words
from rlad.tasks.numbers import Amount, Reading, read_number
from rlad.tasks.units import LARGE_NUMBERS, UNITS, known_unit
from rlad.tasks.written_numbers import SPELT, evaluate_arithmetic, in_digits

_FRACTION = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])\s*([0-9])(?![0-9]))"
)
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?(?:/[0-9]+)?"
# After other words a number may be one of several, or a part of a formula.
_ALONE = r"(?:^|[:;.!]\s|=|\b(?:is|was|are|equals|equal to|gives?|get|have|has|makes?)\s)\s*"
_OR_BEFORE = re.compile(
    rf"{_ALONE}({_NUMBER})(?:\s+([a-z]+))?\s*,?\s+or\s+(?:rather\s+)?$", re.IGNORECASE
)
_OR_AFTER = re.compile(
    rf"[\s)]*,?\s*\(?or\s+(?:equivalently,?\s+|simply\s+|just\s+)?({_NUMBER})[\s).!]*$",
    re.IGNORECASE,
)
_ABOUT = r"\b(?:about|approximately|approx\.?|roughly|around|nearly|almost)|\\approx"
_ADVERBS = (
    r"(?:(?:actually|really|instead|in fact|also|then|therefore|thus|indeed|clearly|exactly|just"
    rf"|only|simply|now|still|probably|likely|however|of course|either|both|{_ABOUT}),?\s++)*+"
)
_BE = r"(?:(?:should|must|would|could|might|may|will|can)\s++(?:(?:also|then|still)\s++)?be)"
_ANSWER_SAID = re.compile(
    r"\b(?:answers?|(?:correct|right|best|final)\s++(?:option|choice|result|total|value|number)"
    r"|respuesta|antwort|r[eé]ponse|risposta|resposta)\b\s*+"
    r"(?:(?:to|of|for|here|then)\b[^.;:=?!]{0,80}?|,\s[^,.;:=?!]{1,30},\s)?"
    rf"(?:\b(?:is|was|are|equals|becomes|es|ist|est|lautet|{_BE})\b|(?<=\s)[è-]|"
    "[:=\N{EN DASH}]"
    r")\s*+:?\s*+(?=(?P<said>.{0,200}))|答案\s*[是为:]*\s*(?=(?P<chinese>.{0,200}))"
    # 6 is also possible
    r"|(?<![\w.,/])(?P<offered>-?[0-9][0-9.,/]*+)\s++(?:(?:is|are|(?:would|could|may|might|can)"
    r"(?:\s++be)?)\s++(?:also|equally|the\s++(?:(?:final|right|correct)\s++)?+answer)"
    r"|(?:also\s++)?works?\s++(?:too|as well|also))\b",
    re.IGNORECASE,
)
_SAID_BEFORE = re.compile(rf"[\s,]*+{_ADVERBS}(?:answer:\s*+)?", re.IGNORECASE)
# Text after these in a sentence is not part of the answer.
_SAID_ENDS = re.compile(
    r",\s(?!-?[0-9])|\s\(?(?:because|since|as|which|so|when|after|with)\b", re.IGNORECASE
)
_LABEL = re.compile(r"^(?:(?:[->|*•#]++|[0-9]{1,2}[.)]|\(?[a-h]\)|\([0-9]\))\s++)*+[|\"'\[(]*+")
_ARROW = r"(?:[-=]*+>|\\to|[→⇒]|=++|,|i\.e\.,?)?+\s*+"
_VALUE = (
    r"(?:[a-z](?:_[0-9a-z])?\s*+(?:=|\\approx)\s*+)?(?:\\approx\s*+)?[-+€£¥]{0,2}"
    r"(?:[0-9]|\.[0-9])[0-9.,/]*+\s?[%€£]?"
)
_SO = (
    r"(?:(?:so|thus|hence|therefore|then|and|but|finally|overall|altogether|that is|i\.e\."
    r"|in (?:total|all|short|conclusion)|i (?:would )?(?:say|think)|hmm|no|oh|well"
    r"|make (?:that|it))[,:]?\s++)*+"
)
_NAMED = (
    r"(?:(?:the|my|our|this|its)\s++)?(?:(?:final|correct|overall|actual|true|new|real)\s++)*+"
    r"(?:answer\s++(?=[^a-z:=])|(?:answer|result|total|solution|value|sum|number|output|amount"
    rf"|final|outcome)\s*+(?:is|was|equals|becomes|comes to|{_BE}|[:=-]))\s*+"
)
_FOUND = (
    r"(?:(?:it|that|this|which|we|i|one|you)(?:'s|\s++(?:is|was|gives?|equals|gets?|have|find"
    rf"|obtain|makes?|means?|{_BE}))\s++)?"
)
_CONCLUDED = re.compile(
    rf"[\s,(]*+{_SO}(?:{_NAMED}{_ADVERBS}(?P<named>{_VALUE}(?:\s++[a-z]++){{0,2}})"
    rf"|{_FOUND}{_ADVERBS}(?P<said>{_VALUE})(?:\s++it\s++is)?)[\s.!)\]|\"']*+",
    re.IGNORECASE,
)
_AMOUNT_ALONE = re.compile(rf"{_ARROW}(?P<said>{_VALUE}(?:\s++[a-z]++)?)\W*+", re.IGNORECASE)
_VALUE_ALONE = re.compile(rf"{_ARROW}(?P<said>{_VALUE})[\s.!)\]|\"']*+", re.IGNORECASE)
_EQUATION = re.compile(
    rf"{_SO}(?P<sides>[-+*/() 0-9]*[0-9)] *=[-+*/() 0-9=]+)[\s.!]*+", re.IGNORECASE
)
# From such a line on, values are steps to the answer, or follow from it.
_EXPLAINED = re.compile(
    r"\W*+(?:check|verif|expla|reason|step|proof|because|since|where|here|for|substitut|plug"
    r"|to (?:verify|check|see|confirm|find|get|solve)|working|calculat|comput|justif|detail|method"
    r"|deriv|given|if|when|at|breakdown|question|q:|let|suppose|solution:?\W*$|how )",
    re.IGNORECASE,
)
_SENTENCES = re.compile(r"(?<=[.;!?])\s+(?![-+*/=<>])")
_CHOICE = re.compile(r"(?<![\w'])[A-J](?![\w'])")
_NUMBER_WORDS = (
    SPELT
    | dict.fromkeys(words("infinity pi none undefined"), None)
    | dict.fromkeys(LARGE_NUMBERS, None)
)
_SAYS_NOTHING = frozenset(
    words(
        "correct right exact verified unique consistent confirmed above below boxed so final valid "
        "simplified rounded reasonable true clear obvious this that it positive negative integer "
        "unchanged following complete finished done proven proved given known simple found the of "
        "straightforward in by from not at to as on what which well very quite one thanks end qed "
        "great good yes ok okay"
    )
)
_NO_NUMBER = re.compile(r"inf$|\\infty|no (?:real )?solutions?\b")
_MAX_SAID = 100
_MAX_CHARACTERS = 2_000
_SEVERAL = re.compile(r"\b(?:or|either|neither|nor|maybe|perhaps|possibly)\b", re.IGNORECASE)
_SETTING = re.compile(
    r"\\[$()\[\]]|[$`{}]|\\(?:text\w*|qquad|quad|[,;:! ])|</?[a-z]{1,6}>|[“”«»]"
    r"|(?<![0-9)*])\*+|\*+(?![0-9(*])",  # but not 2*3
    re.IGNORECASE,
)


def same_number(one: str, other: str) -> bool:
    """Return whether two texts are the same number: `10/2` is `5.0`."""
    values = _value(one), _value(other)
    return values[0] is not None and values[0] == values[1]


def _value(text: str) -> Fraction | None:
    text = _plain(text).strip()
    try:
        return Fraction(text) if re.fullmatch(_NUMBER, text) else None
    except ZeroDivisionError:
        return None


def _plain(text: str) -> str:
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", plain_notation(text))
    text = _FRACTION.sub(r"\1\3/\2\4", text)
    return _SETTING.sub("", text)


def is_restated_before(said: str, found: str, right: str) -> bool:
    """Return whether a text that ends with `or` has the same value as the box after it."""
    said = _plain(said.replace(r"\boxed", ""))
    other = _OR_BEFORE.search(said)
    if other is None or _SEVERAL.search(said[: other.start()]):
        return False
    if other[2] is None:
        return same_number(other[1], found)
    following = re.match(r"\s*([A-Za-z]+)[\s.!]*$", _plain(right))
    units = known_unit(other[2]), known_unit(following[1] if following else "")
    values = _value(other[1]), _value(found)
    if None in units or None in values:
        return False
    (kind, size), (own_kind, own_size) = units  # pyright: ignore
    return kind == own_kind and values[0] * size == values[1] * own_size  # pyright: ignore


def is_restated_after(right: str, found: str) -> bool:
    """Return whether the text after a box only restates its value: `or 5.0`."""
    other = _OR_AFTER.match(_plain(right))
    return other is not None and same_number(other[1], found)


def gives_another(remarks: str, found: str) -> bool:
    """Return whether the text after an answer gives another one: a line that is only a number, `the
    answer is 6`, or `so x = 6` as the last conclusion."""
    own = _plain(found[:_MAX_CHARACTERS].replace(r"\boxed", ""))
    reading = read_number(own)
    text = _plain(remarks.replace(r"\boxed", "answer: ").replace("```python", "working"))
    lines = [_LABEL.sub("", line.strip(), count=1) for line in text.splitlines() if line.strip()]
    said = 0
    last = ""
    is_explained = False
    for given in lines:
        line = in_digits(given)
        is_explained = is_explained or _EXPLAINED.match(line) is not None
        stated = [match[match.lastgroup or 0] for match in _ANSWER_SAID.finditer(line)]
        if len(lines) == 1 and given.strip("().").isalpha():
            stated.append(given)
        if not is_explained and (alone := _alone(given, len(lines))):
            stated.append(alone)
        said += len(stated)
        sentences = _SENTENCES.split(line)
        if not is_explained and any(_contradicts(one, reading) for one in sentences):
            return True
        # A text with more statements has not given one answer.
        if said > _MAX_SAID or any(_is_another(text, own, reading) for text in stated):
            return True
        if not is_explained:
            concluded = [_CONCLUDED.fullmatch(one) for one in sentences]
            last = next((m["named"] or m["said"] for m in reversed(concluded) if m), last)
    return bool(last) and isinstance(reading, Amount) and _is_another(last, own, reading)


def _contradicts(sentence: str, own: Reading) -> bool:
    """Return whether a sentence sets the own answer equal to another whole number: 5 = 6, 2 + 3 =
    6. A sum carried on, 2 + 3 = 5 + 4 = 9, may end with the own answer."""
    equation = _EQUATION.fullmatch(sentence.lstrip(" ."))
    if equation is None or not isinstance(own, Amount):
        return False
    computed = [evaluate_arithmetic(side) for side in re.split("=+", equation["sides"])]
    values = [side[0] for side in computed if side]
    is_carried_on = len(values) > 2 and values[-1] == own.value
    is_whole = all(value.denominator == 1 for value in values)
    return is_whole and own.value in values and len(set(values)) > 1 and not is_carried_on


def _alone(line: str, lines: int) -> str:
    """Return the value if a line has nothing else. If it is the only line, a unit is allowed."""
    match = (_AMOUNT_ALONE if lines == 1 else _VALUE_ALONE).fullmatch(line)
    return match["said"] if match else line if line.casefold() in _NUMBER_WORDS else ""


def _is_another(said: str, own: str, reading: Reading) -> bool:
    """Return whether a text that is stated as the answer is a value that differs from the own
    answer. Prose is not."""
    before = _SAID_BEFORE.match(said)
    assert before is not None  # it also matches the empty text
    said, *_ = _SAID_ENDS.split(_SENTENCES.split(said[before.end() :])[0])
    said = said.rstrip(".").strip(" !\"'|")
    is_about = re.search(_ABOUT, f"{before[0]}{said[:10]}", re.IGNORECASE) is not None
    found = [word.casefold() for word in re.findall(r"(?<!\\)\b[^\W\d_]++", said)]
    if not said or said == own:
        return False
    if said.startswith("not "):
        return said[4:].startswith(own)
    if found and all(word in _NUMBER_WORDS for word in found):
        values = [_NUMBER_WORDS[word] for word in found]
        said = "inf" if None in values else str(sum(filter(None, values)))
    said = re.sub(r"^(?:minus|negative)\s++(?=[0-9])", "-", said)
    if isinstance(reading, Amount):
        is_value = re.match(rf"\W*{_VALUE}", said, re.IGNORECASE)
        is_formula = re.search("[0-9]", said) and not any(len(word) > 1 for word in found)
        is_said = is_value or is_formula or _NO_NUMBER.match(said)
        return bool(is_said) and not _agrees(read_number(said), reading, said, is_about)
    if _CHOICE.fullmatch(own.strip(" ().")):
        return set(_CHOICE.findall(said)) not in (set(), {own.strip(" ().")})
    if _is_formula(own):
        sides = _squeezed(said), _squeezed(own), _squeezed(own.rpartition("=")[2])
        return _is_formula(said) and not is_about and sides[0] not in sides[1:]
    if re.search(r"[0-9\\]", own):
        return re.match(_VALUE, said) is not None and _squeezed(said) not in _squeezed(own)
    own_words = set(re.findall(r"[^\W\d_]+", own.casefold()))
    return 0 < len(found) <= 2 and not set(found) & (own_words | _SAYS_NOTHING)


def _agrees(said: Reading, own: Amount, text: str, is_about: bool) -> bool:
    """Return whether a reading equals an amount, perhaps in another unit or rounded."""
    if not isinstance(said, Amount):
        return False
    value, wanted = said.value, own.value
    if said.unit and own.unit and said.unit[0] == own.unit[0]:
        value, wanted = value * said.unit[1], wanted * own.unit[1]
    percent = [amount.unit == UNITS["%"] for amount in (said, own)]
    scale = Fraction(1, 100) if percent[0] > percent[1] else Fraction(1)
    scale = Fraction(100) if percent[1] > percent[0] else scale
    _, point, decimals = text.partition(".")
    places = len(re.match("[0-9]*", decimals)[0])  # pyright: ignore[reportOptionalSubscript]
    margin = Fraction(1, 2 * 10**places) if point or is_about else Fraction(0)
    margin = max(margin, abs(wanted) / 20) if is_about else margin
    return any(abs(one - wanted) <= margin for one in (value, value * scale))


def _is_formula(text: str) -> bool:
    return bool(text) and not re.search(r"(?<![\\A-Za-z])[^\W\d_]{2,}", text)


def _squeezed(text: str) -> str:
    return re.sub(r"[\s*()]|\\(?:cdot|times)", "", text).casefold()


def ends_with_value(left: str, found: str) -> bool:
    """Return whether a text ends with the content of the box after it, separately: `x = 5 (`."""
    value = re.escape(found)
    # Without a comma, or the end of a formula, 5 (5) is a product.
    apart = r"(?:(?:\$|\\\)),?|,)\s+[(*_`\"'\s]*(?:\$+|\\\()?\s*$"
    end = rf"(?:^|[^\W\d]\s|\$)\s*{value}\s*{apart}"
    return re.search(end, left) is not None
