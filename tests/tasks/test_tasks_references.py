"""Reference answers that cannot be won are found before they are trained on."""

import json
from contextlib import closing

import pytest

from rlad.errors import UserError
from rlad.tasks import SPLITS, make_task
from rlad.tasks.references import require_working_verifier

_LATEX = ("\\frac{{{}}}{{4}}", "{}\\sqrt{{3}}", "(-\\infty, {}]", "{}{{,}}500")
_FEW_NUMBERS = ("proof", "5", "notfound", "A", "6", "BDCA", "7")
LAYOUTS = {
    "gsm8k": lambda i: f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}",
    "open-r1": lambda i: f"<think>count</think>\n<answer> {i + 1} </answer>",
    "boxed": lambda i: f"$\\boxed{{{i + 1}}}$ is it.\nAnswer: \\boxed{{{i + 1}}}",
    "boxed alone": lambda i: f"We count.\n\nSo it is $\\boxed{{{i + 1}}}$, as wanted.",
    "latex": lambda i: _LATEX[i % 4].format(i),
    "placeholders": lambda i: _FEW_NUMBERS[i % 7],
    "words": lambda i: ["red", "green", "New York"][i % 3],
    "grids": lambda i: f"{i} 1\n2 3",
    "plain": str,
}


def task(tmp_path, layout: str, verifier: str, **settings):
    rows = [
        {"prompt": f"Question number {i}: how much is it?", "answer": LAYOUTS[layout](i)}
        for i in range(300)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return closing(make_task("jsonl", path=str(path), verifier=verifier, **settings))


@pytest.mark.parametrize(
    ("layout", "verifier", "said"),
    [
        (
            "gsm8k",
            "exact",
            ["200 are correct only if all of it", '"gsm8k"', "200 of 200"],
        ),
        ("latex", "number", ["of 200 reference answers", "not judged", "is no plain number"]),
        ("placeholders", "number", ["are not judged", "for example 'notfound'"]),
        ("grids", "exact", ["correct only if all of it is marked"]),
    ],
)
def test_what_is_doubtful_is_said_with_its_share_and_an_example(tmp_path, layout, verifier, said):
    with task(tmp_path, layout, verifier) as made:
        (grades,) = require_working_verifier(made)
    assert grades.num_problems == 200
    assert all(words in grades.message for words in said), grades.message


@pytest.mark.parametrize(
    ("layout", "verifier", "answer_format"),
    [
        ("open-r1", "exact", "last"),
        ("boxed", "exact", "boxed"),
        ("boxed alone", "exact", "boxed"),
        ("words", "number", None),
    ],
)
def test_what_nobody_can_win_is_refused(tmp_path, layout, verifier, answer_format):
    with (
        task(tmp_path, layout, verifier) as made,
        pytest.raises(UserError, match="reference answers") as error,
    ):
        require_working_verifier(made)
    hint = f'task.answer_format = "{answer_format}", with which'
    assert (hint in str(error.value)) is (answer_format is not None), error.value


@pytest.mark.parametrize(
    ("layout", "verifier", "answer_format", "answer"),
    [
        ("gsm8k", "exact", "gsm8k", "8"),
        ("gsm8k", "number", "whole", LAYOUTS["gsm8k"](7)),
        ("open-r1", "exact", "last", "8"),
        ("boxed", "exact", "boxed", "8"),
        ("boxed", "exact", "last", "8"),
        ("boxed alone", "number", "boxed", "8"),
        ("boxed alone", "number", "whole", LAYOUTS["boxed alone"](7)),
        ("words", "exact", "whole", "green"),
        ("plain", "number", "whole", "7"),
    ],
)
def test_answer_formats(tmp_path, layout, verifier, answer_format, answer):
    with task(tmp_path, layout, verifier, answer_format=answer_format) as made:
        problems = [
            made.problem(split, i) for split in SPLITS for i in range(made.num_problems(split) or 0)
        ]
        (problem,) = [problem for problem in problems if "number 7:" in problem.prompt]
        assert problem.answer == answer
        (grades,) = require_working_verifier(made)
        assert (grades.num_correct, grades.message) == (200, "")


def test_an_answer_that_lacks_its_format_is_named_by_its_line(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: .* no answer of the format 'gsm8k'"):
        task(tmp_path, "plain", "exact", answer_format="gsm8k")


def test_generated_tasks_want_a_mark(tmp_path):
    (grades,) = require_working_verifier(make_task("knights_and_knaves", num_people=[2]))
    assert (grades.num_problems, grades.num_correct) == (200, 200)


def test_a_verifier_of_the_users_own_may_want_a_mark(tmp_path):
    with task(tmp_path, "plain", "user_verifiers:boxed_alone") as made:
        (grades,) = require_working_verifier(made)
    assert (grades.num_correct, grades.message) == (200, "")


def test_a_verifier_that_prints_does_not_write_to_standard_output(tmp_path, monkeypatch, capfd):
    (tmp_path / "printing.py").write_text(
        "print('imported')\ndef judge(completion, answer):\n    print('judged')\n    return True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with task(tmp_path, "plain", "printing:judge") as made:
        require_working_verifier(made)
    printed = capfd.readouterr()
    assert printed.out == "" and "judged" in printed.err and "imported" in printed.err
