import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlad.tasks.answers import (
    final_answer,
    first_line,
    marked_answer,
    normalised,
    without_cut_answer,
    without_cut_ending,
)
from rlad.tasks.boxes import boxed_answer
from rlad.tasks.notation import without_wrapping
from rlad.tasks.numbers import read_number
from rlad.tasks.written_numbers import evaluate_arithmetic


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> no, <answer> 2 </answer> Answer: 3", ""),  # another one
        ("cut off <answer>2", ""),
        ("<answer></answer>", ""),
        ("Answer: 1\nAnswer: 2", "2"),
        ("The final ANSWER: 2 \n", "2"),
        ("**Answer:** 2", "2"),
        ("**Answer: 2**", "2"),
        ("Answer: **2**", "2"),
        ("**Answer:** **2**", "2"),
        ("<answer>**2**</answer>", "2"),
        ("So:\n**2**\n", "2"),
        ("Answer: **2** or **3**", "**2** or **3**"),
        ("Answer: 2**3", "2**3"),
        ("Answer:\n1 2\n3 4\n", "1 2\n3 4"),
        # markdown, in and around the marker; other colons
        ("**Answer**: 2", "2"),
        ("*Answer*: *2*", "2"),
        ("***Answer***: ***2***", "2"),
        ("__Answer:__ 2", "2"),
        ("__Answer__: 2", "2"),
        ("_Answer_: 2", "2"),
        ("`Answer`: `2`", "2"),
        ("`Answer: 2`", "2"),
        ("~~Answer~~: 2", "2"),
        ("**Final Answer:** 2", "2"),
        ("**The answer: 2**", "2"),
        ("**Answer: 2**\nas 1 + 1 is", "2\nas 1 + 1 is"),
        ("### Answer: 2", "2"),
        ("- **Answer**: 2", "2"),
        ("> Answer: 2", "2"),
        ("<b>Answer</b>: 2", "2"),
        ("<strong>Answer:</strong> 2", "2"),
        (r"\textbf{Answer:} 2", "2"),
        (r"\textbf{Answer}: 2", "2"),
        ("Answer : 2", "2"),
        ("Answer\N{NO-BREAK SPACE}: 2", "2"),
        ("Answer\N{FULLWIDTH COLON}2", "2"),
        ("**Answer**\N{FULLWIDTH COLON} 2", "2"),
        ("Answer: Rome? No.\n**Answer**: Oslo", "Oslo"),
        ("**Answer**: Rome? No.\nAnswer: Oslo", "Oslo"),
        # other words that hold it
        ("A counteranswer: 2", "A counteranswer: 2"),
        ("my_answer: 2", "my_answer: 2"),
        ("a non-answer: 2", "a non-answer: 2"),
        ("Answers: 2", "Answers: 2"),
        ("The answer is: 2", "The answer is: 2"),
        # boxes: the later of box and marker
        ("So \\boxed{2}.\nThat took 3 steps.", "2"),
        (r"\boxed{**2**}", "2"),
        ("Answer: 1\nNo, \\boxed{2}.", "2"),
        ("\\boxed{1}? No.\nAnswer: 2", "2"),
        ("\\boxed{2}.\nAnswer:", "2"),
        (r"<answer>\boxed{2}, see step 3</answer>", "2"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        (r"\boxed{1}, so \boxed{2", ""),
        ("<answer>Answer: 2</answer>", "2"),
        # thoughts
        ("<think>1</think> 2", "2"),
        ("<think> \\boxed{1} </think>\nAnswer: 2", "2"),
        ("<think> so \\boxed{2}, or not </think>", ""),
        ("<think> first it is 2", ""),
        ("<think><answer>2</answer>?</think> I do not know.", "I do not know."),
        ("it is 1 </think> 2", "2"),
        ("1 </think> 2 <think> 3", ""),
        ("Answer: 2 <think>1</think>", "2"),
        ("Answer: <think>1</think>2", "2"),
        ("<think><think>1</think>3</think> 2", "2"),
        ("<think>" + "x" * 300_000 + "\n2", ""),
        ("I think\n\n it is 2 \n\n", "it is 2"),
        ("", ""),
        ("x" * 300_000 + "\n2", "2"),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("2\n\nThat took 3 steps.", "2"),
        ("2\nThat took 3 steps.", "2"),
        ("$$\n2\n$$\nThat", "2"),
        ("\\[\n2\n\\]\nThat", "2"),
        ("```\n2\n```", "2"),
        ("$$\n2", ""),
        ("", ""),
    ],
)
def test_first_line(answer, line):
    assert first_line(answer) == line


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        (r"\text{Oslo}", "Oslo"),
        (r"$\text{Oslo}$", "Oslo"),
        (r"\mathrm{Oslo}", "Oslo"),
        ("$5", "$5"),
        ("$5 and $6", "$5 and $6"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_without_wrapping(text, bare):
    assert without_wrapping(text) == bare


def test_marked_answer_needs_a_mark():
    assert marked_answer("it is 2") is None
    assert marked_answer("Answer:") == ""


@pytest.mark.parametrize(
    ("cut_off", "judged"),
    [
        ("6 * 7 =\nAnswer: 4", "6 * 7 =\nAnswer:"),
        ("Answer: 42\nNo,\nanswer: 4", "Answer: 42\nNo,\nanswer:"),
        ("**Answer:**\n\n4", "**Answer:"),
        ("**Answer**: 4", "**Answer**:"),
        ("__Answer:__ 4", "__Answer:"),
        ("Answer\N{FULLWIDTH COLON} 4", "Answer\N{FULLWIDTH COLON}"),
        ("**Answer: 42**", "**Answer:"),  # more of it may have followed, such as another number
        ("Answer:\n", "Answer:"),
        ("Answer: 3.", "Answer:"),
        ("Answer: Ada is a knight, Ben is a kna", "Answer:"),
        ("Answer: Ada is a knight.", "Answer: Ada is a knight."),
        ("**Answer: Ada is a knight.** ", "**Answer: Ada is a knight.** "),
        ("Answer: 42\n", "Answer: 42\n"),
        ("Answer: 42\nFor 6 *", "Answer: 42\nFor 6 *"),
        ("Answer:\n1 2\n3 ", "Answer:\n1 2\n3 "),
        ("<answer>42</answer> As I", "<answer>42</answer> As I"),
        ("Answer: <answer>42</answer>", "Answer: <answer>42</answer>"),
        ("<answer>Answer: 42</answer>", "<answer>Answer: 42</answer>"),
        ("Answer: <answer>4", "Answer: <answer>4"),
        (r"Answer: $\boxed{42}$", r"Answer: $\boxed{42}$"),
        ("6 * 7 = 4", "6 * 7 = 4"),
        ("", ""),
    ],
)
def test_an_answer_in_which_the_text_is_cut_off_is_left_out(cut_off, judged):
    assert without_cut_answer(cut_off) == judged


@pytest.mark.parametrize(
    ("cut_off", "answer"),
    [
        ("So she makes 18", ""),
        ("So she makes 18.", ""),  # 18.5
        ("9 * 2 = 18\nSo she mak", ""),
        ("It is Paris.", "It is Paris."),
        ("So it is 18\n", "So it is 18"),
        ("Answer: 18", ""),
        ("Answer: 18\nas 9 * 2", "18\nas 9 * 2"),
        ("\\boxed{18} as 9 *", "18"),
        ("<answer>18</answer> as 9", "18"),
    ],
)
def test_of_a_text_that_is_cut_off_the_last_line_is_no_answer(cut_off, answer):
    assert final_answer(without_cut_ending(cut_off)) == answer


def test_what_is_left_of_a_cut_answer_is_none():
    left = without_cut_answer("Answer: 42 or\nAnswer: 4")
    assert (
        marked_answer(left),
        final_answer(left),
        final_answer(without_cut_answer("**Answer: 4")),
    ) == ("", "", "")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{1}, rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} and }", r"\{1, 2\}"),
        (r"\boxed{3", ""),
        (r"\boxed 3", "3"),
        ("{3}", None),
    ],
)
def test_boxed_answer(completion, answer):
    assert boxed_answer(completion) == answer


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("  **Paris**. ", "paris"),
        ("*The*  `Answer`\n is _Paris_", "the answer is paris"),
        ("x**2 + 2 * snake_case", "x**2 + 2 * snake_case"),
        ("3.5 is .5", "3.5 is .5"),
        ("# A", "# a"),
    ],
)
def test_normalised(text, result):
    assert normalised(text) == result


@pytest.mark.parametrize(
    ("expression", "value", "numbers"),
    [
        ("82 + 20 + 67 - 50", 119, [82, 20, 67, 50]),
        ("(1 + 2) * 3", 9, [1, 2, 3]),
        ("-1 / 3", Fraction(-1, 3), [1, 3]),
        (" 7 ", 7, [7]),
    ],
)
def test_evaluate_arithmetic(expression, value, numbers):
    assert evaluate_arithmetic(expression) == (value, numbers)


@pytest.mark.parametrize(
    "expression",
    [
        "2 ** 3", "9**9**9**9", "7 // 2", "1 / 0", "1 +", "", "x", "True", "1.5", "'a' * 3",
        "(1, 2)", "abs(1)",
        "0x3 + 5", "3 + 5 # or 6", "1if 2else 3", "1_0 + 2",
        "1 if 1 else 2", "__import__('os')._exit(1)", "1 = 1", "1\x00",
        "(" * 300, "-" * 499 + "1 +", "1+" * 300 + "1", "[1][0]", "lambda: 1",
    ],
)  # fmt: skip
def test_what_is_no_arithmetic(expression):
    assert evaluate_arithmetic(expression) is None


ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=200),
    st.text("<answer>/Answer: \\boxed{}0123456789,.-+$%eE()*_`#\n\x00", max_size=200),
)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_any_text_has_answers_without_raising(text):
    assert final_answer(text) in text or any(mark in text for mark in "*_`")
    assert normalised(f" {text}\n") == normalised(text)
    boxed_answer(text), evaluate_arithmetic(text), read_number(text)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("abcxyz0123", min_size=1), min_size=1), st.sampled_from(["**", "*", "_", "`"])
)
def test_normalised_ignores_markdown_case_and_space(words, mark):
    assert normalised(mark + "\n ".join(words).upper() + mark + ".") == " ".join(words)


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "1",
        ",",
        "1,",
        "1,111",
        "1/",
        ".",
        "-",
        "answer:",
        "<answer>",
        "\\boxed{",
        "{",
        "**",
        " ",
        "\x00",
    ],
)
def test_megabytes_take_less_than_a_second(unit):
    text = unit * (2_000_000 // len(unit))
    started = time.process_time()
    (
        final_answer(text),
        normalised(text),
        boxed_answer(text),
        evaluate_arithmetic(text),
    )
    assert time.process_time() - started < 1
