"""The number that an answer gives: whole, or none."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlad.tasks.numbers import Amount, Figures, Unreadable, read_number
from written_answers import number_forms, numbers

UNREADABLE = "unreadable"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("It costs $1,234,567.50.", Fraction("1234567.5")),
        ("\\$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        ("x = -7", -7),
        ("x = \N{MINUS SIGN}7", -7),
        ("10 - 3 = 7", 7),
        ("+.5", Fraction(1, 2)),
        ("12%", 12),
        ("12 percent", 12),
        ("3/4.", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("1.5/2.5", Fraction(3, 5)),
        ("1e-3.", Fraction(1, 1000)),
        ("007", 7),
        ("0.1", Fraction(1, 10)),
        ("#### 18", 18),
        ("9" * 500, int("9" * 500)),
        # thousands
        ("9{,}500", 9500),
        ("$9{,}500", 9500),
        (r"9\,500", 9500),
        ("1,00,000 rupees", 100_000),
        ("1 000 000", 1_000_000),
        ("1'000", 1000),
        ("1_000", 1000),
        ("1\N{NARROW NO-BREAK SPACE}000", 1000),
        ("1\N{ARABIC THOUSANDS SEPARATOR}000", 1000),
        ("1.000.000", 1_000_000),
        ("1.000,50", Fraction("1000.5")),
        # fractions, mixed numbers, powers of ten
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"$\dfrac{10}{4}$", Fraction(5, 2)),
        (r"\frac12", Fraction(1, 2)),
        ("3 1/2", Fraction(7, 2)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("3\N{VULGAR FRACTION ONE HALF}", Fraction(7, 2)),
        ("2 1/2 cups", Fraction(5, 2)),
        ("1.5 x 10^3", 1500),
        (r"1.5\times10^{3}", 1500),
        ("1.5\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT THREE}", 1500),
        ("4.5 million dollars", 4_500_000),
        ("2 dozen", 24),
        # digits of other scripts
        ("\N{ARABIC-INDIC DIGIT THREE}", 3),
        ("1\N{ARABIC-INDIC DIGIT THREE}", 13),
        ("\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT TWO}", 12),
        ("\N{DEVANAGARI DIGIT ONE}\N{DEVANAGARI DIGIT TWO}", 12),
        # units, words, markdown
        ("18 eggs", 18),
        ("5cm", 5),
        (r"5 \text{ cm}^2", 5),
        ("5 cm\N{SUPERSCRIPT TWO}", 5),
        ("the 5th", 5),
        ("(B) 42", 42),
        ("It is **42**.", 42),
        ("`42`", 42),
        (r"\text{42}", 42),
        ("90\N{DEGREE SIGN}", 90),
        ("minus 5", -5),
        ("about 42 km/h", 42),
        ("$5/hour", 5),
        ("42 (see above)", 42),
        # what is denied does not count
        ("$20, not $30", 20),
        ("not 30 but 20", 20),
        ("5 instead of 6", 5),
        ("US$1,234.50", Fraction("1234.5")),
        # equations
        ("6 * 7 = 42", 42),
        ("42 = 6 * 7", 42),
        ("x = 5", 5),
        ("5 = x", 5),
        ("6*7 -> 42", 42),
        ("22/7 \N{ALMOST EQUAL TO} 3.14", Fraction(22, 7)),
        ("7 = 42", UNREADABLE),
        # no plain number
        ("1/0", UNREADABLE),
        ("9" * 501, UNREADABLE),
        ("2e", UNREADABLE),
        ("f(2)-3", UNREADABLE),
        ("3 and a half", UNREADABLE),
        ("half of 42", UNREADABLE),
        ("twice 42", UNREADABLE),
        ("1010_2", UNREADABLE),
        ("101\N{SUBSCRIPT TWO}", UNREADABLE),
        ("x\N{SUPERSCRIPT TWO}", UNREADABLE),
        ("5\N{SUPERSCRIPT TWO}", UNREADABLE),
        ("2^{10}", UNREADABLE),
        (r"2\sqrt{3}", UNREADABLE),
        (r"5\pi", UNREADABLE),
        ("5i", UNREADABLE),
        ("3x", UNREADABLE),
        ("5!", UNREADABLE),
        ("42?", UNREADABLE),
        ("< 5", UNREADABLE),
        ("\N{GREATER-THAN OR EQUAL TO} 5", UNREADABLE),
        ("7 a.m.", UNREADABLE),
        ("5pm", UNREADABLE),
        ("H2O", UNREADABLE),
        ("5-year-old", UNREADABLE),
        ("1.2.3", UNREADABLE),
        ("0x1F", UNREADABLE),
        ("5 (mod 7)", UNREADABLE),
        ("5 + 3", UNREADABLE),
        ("3 + 3", UNREADABLE),
        ("3 R 1", UNREADABLE),
        ("5k", UNREADABLE),
        ("(x, 5)", UNREADABLE),
        (r"(-\infty, 5]", UNREADABLE),
        # several numbers
        ("5 or 6", UNREADABLE),
        ("12,345 or 1,23", UNREADABLE),
        ("between 5\N{EN DASH}10", UNREADABLE),
        ("18 eggs in 3 baskets", UNREADABLE),
        ("42, see step 3", UNREADABLE),
        ("5 and 5", 5),
        ("none", None),
        ("not 5", UNREADABLE),
        ("", None),
    ],
)
def test_read_number(text, value):
    reading = read_number(text)
    if value == UNREADABLE:
        assert isinstance(reading, Unreadable)
    else:
        assert (reading and reading.value) == value, reading


@pytest.mark.parametrize(
    ("text", "shape", "values"),
    [
        ("9:30", "#:#", (9, 30)),
        ("(3, 4)", "(#,#)", (3, 4)),
        ("1,2", "#,#", (1, 2)),
        ("1,0000", "#,#", (1, 0)),
        ("10-3", "#-#", (10, 3)),
        ("2024-05-01", "#-#-#", (2024, 5, 1)),
        ("5/1/2024", "#-#-#", (5, 1, 2024)),
        (r"\{1,2\}", r"\{#,#\}", (1, 2)),
    ],
)
def test_several_numbers_are_read_with_their_signs(text, shape, values):
    assert read_number(text) == Figures(shape, values)


def test_of_prose_the_last_number_counts():
    read = [
        read_number(text, is_marked=False)
        for text in ("18 eggs in 3 baskets", "5 or 6", "5 + 3", "(3, 4)", "It is x3", "7 of them")
    ]
    assert [isinstance(reading, Amount) for reading in read] == [True, *[False] * 4, True]
    assert read[0] == Amount(Fraction(3)) and read[-1] == Amount(Fraction(7))


@settings(max_examples=300, deadline=None)
@given(numbers, st.data(), st.text("abc xyz\n", max_size=20))
def test_every_form_of_a_number_is_read_back(value, data, before):
    form = data.draw(st.sampled_from([f for f in number_forms(value) if "overline" not in f]))
    assert read_number(form) == Amount(value)
    reading = read_number(f"{before}: {form}", is_marked=False)
    assert isinstance(reading, Unreadable) or reading == Amount(value)
