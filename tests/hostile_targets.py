"""What faces hostile text, each with inputs and a check: nothing but the documented error, and no
wrong "correct"."""

import json
import math
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import written_answers
from answer_classes import CLASSES
from hostile_texts import (
    any_text,
    completions,
    expressions,
    hostile_text,
    json_values,
    written_numbers,
)
from report_runs import write_run
from rlad.comparison.finished_runs import MissingRun, ReportedRun, read_run
from rlad.comparison.report import markdown
from rlad.config.file import DEFAULT_RUN, dump_config, load_config, parse_config, parse_overrides
from rlad.config.template import fill_template, template_names
from rlad.errors import UserError
from rlad.runs.directory import EVAL, METRICS, SAMPLES, RunDirectory
from rlad.tasks.base import Judgement, Verdict
from rlad.tasks.jsonl import JsonlTask
from rlad.tasks.logic import ROLES, KnightsAndKnaves, parse_answer
from rlad.tasks.verifiers import exact, make_verifier, number
from rlad.tasks.written_numbers import evaluate_arithmetic
from rlad.teachers.served.protocol import read_generation, read_scores
from rlad.text import printable


@dataclass(frozen=True)
class Target:
    """`check` raises for whatever must not happen with an input of `inputs`; `weight` says how many
    inputs it deserves."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    weight: float = 1.0


def require_sound(judgement: Judgement) -> None:
    assert (
        str(judgement.reward)
        == {"correct": "1.0", "wrong": "0.0", "cannot_judge": "nan"}[judgement.verdict]
    ), judgement


# --- verifiers ------------------------------------------------------------------------------------


def letters(text: str) -> str:
    """What is left of a text when all that `exact` passes over is taken away."""
    return "".join(c for c in text.casefold() if not c.isspace() and c not in "*_`#.")


def check_exact(example: tuple[str, str]) -> None:
    completion, answer = example
    judgement = exact(completion, answer)
    require_sound(judgement)
    if judgement.verdict == Verdict.CORRECT:
        assert letters(answer) in letters(completion), (
            "a completion without the answer in it is called correct"
        )


def check_number(example: tuple[str, tuple[str, Fraction], tuple[str, Fraction], str]) -> None:
    """The number of the final answer decides, whatever stands before it; words after it may make
    something else of it, but never another number."""
    before, (found, found_value), (wanted, wanted_value), after = example
    judgement = number(f"{before}\nAnswer: {found} {after}", wanted)
    require_sound(judgement)
    is_equal = found_value == wanted_value
    if judgement.verdict == Verdict.CORRECT or not after:
        assert (judgement.verdict == Verdict.CORRECT) == is_equal, judgement


def check_written_numbers(example: tuple[str, Fraction, str, Fraction]) -> None:
    """In any form: correct exactly when the fractions are equal."""
    found, found_value, wanted, wanted_value = example
    for completion in (f"Answer: {found}", f"\\boxed{{{found}}}", f"so it is {found}"):
        judgement = number(completion, wanted)
        assert (judgement.verdict == Verdict.CORRECT) == (found_value == wanted_value), judgement


@st.composite
def two_numbers(draw: st.DrawFn) -> tuple[str, Fraction, str, Fraction]:
    one = draw(written_answers.numbers)
    other = one if draw(st.booleans()) else draw(written_answers.numbers)
    forms = [
        draw(st.sampled_from([f for f in written_answers.number_forms(v) if "overline" not in f]))
        for v in (one, other)
    ]
    return forms[0], one, forms[1], other


def check_number_in_any_text(example: tuple[str, tuple[str, Fraction]]) -> None:
    completion, (wanted, _) = example
    judgement = number(completion, wanted)
    require_sound(judgement)
    if judgement.verdict == Verdict.CORRECT:
        assert any(c.isnumeric() for c in completion), (
            "a completion without a digit is called correct"
        )


def check_arithmetic(example: tuple[str, Fraction | None, list[int]]) -> None:
    text, value, used = example
    assert evaluate_arithmetic(text) == (
        None if value is None or len(text) > 500 else (value, used)
    )


def check_arithmetic_of_any_text(text: str) -> None:
    found = evaluate_arithmetic(text)
    if found is not None:
        assert all(
            c.isdigit() or c.isspace() or c in "+-*/()_xXoObBabcdefABCDEF\\"
            for c in text.partition("#")[0]
        ), text


@cache
def puzzles() -> tuple[KnightsAndKnaves, list[Any]]:
    task = KnightsAndKnaves(num_people=[2, 3, 4])
    return task, [task.problem("train", i) for i in range(30)]


@st.composite
def logic_answers(draw: st.DrawFn) -> tuple[int, str, dict[str, bool] | None]:
    """A puzzle, a completion, and the roles that it says (None: a text that says none of its
    own)."""
    index = draw(st.integers(0, 29))
    names, world = (puzzles()[1][index].metadata[key] for key in ("names", "world"))
    if draw(st.integers(0, 3)) == 0:
        return index, draw(completions), None
    said = {
        name: draw(st.booleans()) if draw(st.integers(0, 3)) == 0 else truth
        for name, truth in zip(names, world, strict=True)
    }
    order = draw(st.permutations(list(said)))
    mark = draw(st.sampled_from(["", "**", "_", "`", "*"]))
    change = draw(
        st.sampled_from(
            [
                str,
                str.upper,
                str.lower,
                lambda s: s.replace("i", "\u0131"),
                lambda s: s.replace("a", "\u0430"),
            ]
        )
    )
    text = draw(st.sampled_from([", ", "; ", ".\n", " and "])).join(
        f"{mark}{n}{mark} is a {ROLES[said[n]]}" for n in order
    )
    head = draw(hostile_text.filter(lambda t: "<" not in t))
    return (
        index,
        f"{head}\nAnswer: {change(text)}.",
        said if change in (str, str.upper, str.lower) else {},
    )


def check_logic(example: tuple[int, str, dict[str, bool] | None]) -> None:
    index, completion, said = example
    task, problems = puzzles()
    problem = problems[index]
    truth = dict(zip(problem.metadata["names"], problem.metadata["world"], strict=True))
    judgement = task.judge(problem, completion)
    require_sound(judgement)
    if said is not None:
        assert (judgement.verdict == Verdict.CORRECT) == (said == truth), (
            "the verdict is not that of the roles that were said"
        )
    elif judgement.verdict == Verdict.CORRECT:
        assert all(
            f"{name} is a {ROLES[role]}".lower() in completion.lower()
            for name, role in truth.items()
        )


def check_logic_rl(completion: str) -> None:
    task = KnightsAndKnaves(num_people=[2], reward="logic_rl")
    problem = puzzles()[1][0]
    judgement = task.judge(problem, completion)
    assert judgement.reward in (-3.0, -1.0, -0.5, 3.0)
    if judgement.reward == 3.0:
        assert parse_answer(problem.answer) == parse_answer(completion)


@cache
def math_verifier() -> Any:
    return make_verifier("math", timeout_seconds=5)


def as_latex(number: tuple[str, Fraction]) -> str:
    value = number[1]
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def check_math(example: tuple[tuple[str, Fraction], tuple[str, Fraction], bool, str]) -> None:
    """Fractions against fractions."""
    found, wanted, is_boxed, before = example
    text = f"\\boxed{{{as_latex(found)}}}" if is_boxed else f"Answer: ${as_latex(found)}$"
    judgement = math_verifier().judge(f"{before}\n{text}", as_latex(wanted))
    require_sound(judgement)
    assert (judgement.verdict == Verdict.CORRECT) == (found[1] == wanted[1]), judgement


def check_written_answers(example: tuple[str, str, bool | None]) -> None:
    """Answers of all kinds in any form: never correct when they are not equal, never wrong when
    they are."""
    found, wanted, is_equal = example
    judgement = math_verifier().judge(f"\\boxed{{{found}}}", wanted)
    require_sound(judgement)
    if is_equal is not None:
        never = Verdict.WRONG if is_equal else Verdict.CORRECT
        assert judgement.verdict != never, (found, wanted)


def check_classes(example: tuple[tuple[int, str], tuple[int, str]]) -> None:
    """Answers of the same class are correct for each other, others never are."""
    (one, found), (other, wanted) = example
    judgement = math_verifier().judge(f"\\boxed{{{found}}}", wanted)
    assert (judgement.verdict == Verdict.CORRECT) == (one == other), (found, wanted, judgement)


def check_math_of_any_text(example: tuple[str, tuple[str, Fraction]]) -> None:
    completion, wanted = example
    judgement = math_verifier().judge(completion, as_latex(wanted))
    require_sound(judgement)
    assert "does not start" not in judgement.reason


# --- files ----------------------------------------------------------------------------------------


@cache
def scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="hostile-")
    scratch_folders.append(folder)
    return Path(folder.name)


scratch_folders: list[Any] = []

DEFAULT_TEXT = DEFAULT_RUN.read_text(encoding="utf-8")
DEFAULT_LINES = DEFAULT_TEXT.splitlines()
KEYS = (
    "student",
    "teacher",
    "task",
    "objective",
    "rollout",
    "optimization",
    "evaluation",
    "engine",
    "seed",
    "run_dir",
    "type",
)


@st.composite
def changed_tomls(draw: st.DrawFn) -> str:
    """The default config with some lines cut, doubled, swapped or spoiled."""
    lines = list(DEFAULT_LINES)
    for _ in range(draw(st.integers(1, 4))):
        at, how = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, 3))
        if how == 0:
            lines[at] = draw(hostile_text)
        elif how == 1:
            lines[at] += draw(hostile_text)
        elif how == 2:
            lines.insert(draw(st.integers(0, len(lines))), lines[at])
        else:
            lines[at] = lines[at].partition("=")[0] + "= " + json.dumps(draw(json_values))
    return "\n".join(lines)


def refused_or(read: Callable[[], Any]) -> Any:
    """What `read` returns; None where it raises its one documented error, which must say
    something."""
    try:
        return read()
    except UserError as error:
        assert str(error).strip(), "an error without a word"
        printable(str(error)).encode()
        return None


def check_toml(text: str) -> None:
    path = scratch() / "run.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    config = refused_or(lambda: load_config(path))
    if config is not None:
        assert parse_config(tomllib.loads(dump_config(config))) == config, (
            "a config does not come back as it was written"
        )


def check_tables(example: tuple[dict[str, Any], list[str]]) -> None:
    table, overrides = example
    config = refused_or(
        lambda: parse_config(parse_overrides(tomllib.loads(DEFAULT_TEXT) | table, overrides))
    )
    if config is not None:
        refused_or(lambda: dump_config(config).encode())


lines_of_json = st.lists(
    json_values.map(json.dumps)
    | any_text
    | st.fixed_dictionaries(
        {"prompt": hostile_text, "answer": json_values}, optional={"hint": json_values}
    ).map(json.dumps),
    max_size=6,
).map("\n".join)


def check_jsonl(text: str) -> None:
    path = scratch() / "problems.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    task = refused_or(
        lambda: (
            JsonlTask(str(path), validation_path=str(path))
            if "validation" in text
            else JsonlTask(str(path))
        )
    )
    if task is not None:
        problem = task.problem("train", 0)
        f"{problem.prompt}{problem.answer}{problem.metadata}".encode()


@cache
def finished_run() -> Path:
    return write_run(scratch() / "run", correct=[1, 2])


@st.composite
def spoiled_rows(draw: st.DrawFn) -> tuple[str, bytes]:
    """One file of a finished run with a line replaced, cut, or put in; and its content."""
    name = draw(st.sampled_from([METRICS, EVAL, SAMPLES]))
    lines = original(name).splitlines(keepends=True)
    new = draw(json_values.map(json.dumps) | any_text).encode("utf-8", "surrogatepass") + b"\n"
    at = draw(st.integers(0, len(lines)))
    if lines and draw(st.booleans()):
        row = json.loads(lines[at % len(lines)])
        row[draw(st.sampled_from(sorted(row)))] = draw(json_values)
        new = json.dumps(row).encode() + b"\n"
        lines.pop(at % len(lines))
    return name, b"".join([*lines[:at], new, *lines[at:]])[: draw(st.none() | st.integers(0, 2000))]


@cache
def original(name: str) -> bytes:
    return (finished_run() / name).read_bytes()


def check_rows(example: tuple[str, bytes]) -> None:
    name, content = example
    (finished_run() / name).write_bytes(content)
    try:
        refused_or(lambda: list(RunDirectory(finished_run()).read(name)))
        read = read_run(ReportedRun("method", finished_run()))
        if isinstance(read, MissingRun):
            assert read.reason.strip()
    finally:
        (finished_run() / name).write_bytes(original(name))


# --- servers --------------------------------------------------------------------------------------

entries = st.none() | st.dictionaries(
    st.sampled_from(["5", "6", "x"]),
    st.fixed_dictionaries(
        {"logprob": json_values | st.floats(-50, 1)}, optional={"decoded_token": json_values}
    )
    | json_values,
)
choices = st.fixed_dictionaries(
    {},
    optional={
        "prompt_logprobs": json_values | st.lists(entries, min_size=3, max_size=3),
        "logprobs": json_values
        | st.fixed_dictionaries(
            {
                "tokens": json_values
                | st.lists(
                    st.sampled_from(["token_id:5", "token_id:6", "x"]) | json_values,
                    min_size=3,
                    max_size=3,
                ),
                "token_logprobs": json_values
                | st.lists(st.none() | st.floats(-50, 1) | json_values, min_size=3, max_size=3),
                "top_logprobs": json_values,
            }
        ),
    },
)
answers = st.fixed_dictionaries(
    {"choices": json_values | st.lists(choices | json_values, max_size=2)}
) | json_values.filter(lambda value: isinstance(value, dict))


def check_answer(answer: dict[str, Any]) -> None:
    """A log-prob that is believed stands in the answer for that very token, and is one."""
    tokens = [4, 5, 6]
    for scoring in ("prompt_logprobs", "echo"):
        scores = read_scores(scoring, answer, tokens)
        assert len(scores) == 3
        for token, score in zip(tokens, scores, strict=True):
            value = score.logprob
            assert math.isnan(value) or value <= 0.01
            if not math.isnan(value) and scoring == "prompt_logprobs":
                assert any(
                    entry and entry.get(str(token), {}).get("logprob") == value
                    for entry in answer["choices"][0][scoring][1:]
                )
    written = read_generation(answer)
    assert all(isinstance(token, int) and value <= 0.01 for token, value in written)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    body = {
        "model": "tiny",
        "prompt": draw(json_values | st.lists(st.integers(0, 99), max_size=5)),
    } | draw(
        st.dictionaries(
            st.sampled_from(["max_tokens", "logprobs", "prompt_logprobs", "temperature", "seed"]),
            json_values,
        )
    )
    text = json.dumps(body).encode()
    return (
        text[: draw(st.none() | st.integers(0, len(text)))]
        if draw(st.booleans())
        else draw(st.binary(max_size=200)) or text
    )


def check_request(body: bytes) -> None:
    from rlad.serving.protocol import parse_request

    asked = refused_or(lambda: parse_request(body))
    if asked is not None:
        assert asked.num_new_tokens >= 0 and (asked.prompt_logprobs or 0) <= 64


# --- what people see ------------------------------------------------------------------------------


def check_shown(text: str) -> None:
    assert all(c.isprintable() or c in "\n\t" for c in printable(text))
    page = markdown(text)
    assert (
        "\n" not in page and "<script" not in page.lower() and "](" not in page.replace(r"\]", "")
    )


def check_template(example: tuple[str, str]) -> None:
    template, value = example
    names = refused_or(lambda: template_names(template))
    if names is not None:
        filled = fill_template(template, dict.fromkeys(names, value))
        assert value in filled or not names


overrides = st.tuples(
    st.lists(st.sampled_from(KEYS), min_size=1, max_size=3).map(".".join), hostile_text
).map("=".join)
numbers = written_numbers()
class_members = st.sampled_from([(i, text) for i, texts in enumerate(CLASSES) for text in texts])
quiet_text = st.text(
    st.characters(categories=["L", "Z", "P"], exclude_characters="<>:/.,-+$%_"), max_size=30
)

TARGETS = {
    "exact": Target(st.tuples(completions, hostile_text), check_exact),
    "number": Target(
        st.tuples(
            completions.filter(lambda t: "<" not in t), numbers, numbers, st.just("") | quiet_text
        ),
        check_number,
    ),
    "number, equal": Target(
        st.tuples(st.just("so"), numbers, numbers, quiet_text).map(
            lambda t: (t[0], t[1], (str(t[1][1]), t[1][1]), t[3])
        ),
        check_number,
    ),
    "number, any text": Target(st.tuples(completions, numbers), check_number_in_any_text),
    "arithmetic": Target(expressions(), check_arithmetic),
    "arithmetic, any text": Target(
        hostile_text | st.text("0123456789+-*/() ", max_size=40), check_arithmetic_of_any_text
    ),
    "logic": Target(logic_answers(), check_logic, 2),
    "logic_rl": Target(completions, check_logic_rl, 0.5),
    "number, written": Target(two_numbers(), check_written_numbers),
    "math, written": Target(written_answers.pairs(), check_written_answers, 0.5),
    "math, classes": Target(st.tuples(class_members, class_members), check_classes, 0.5),
    "math": Target(st.tuples(numbers, numbers, st.booleans(), quiet_text), check_math, 0.25),
    "math, any text": Target(st.tuples(hostile_text, numbers), check_math_of_any_text, 0.25),
    "config file": Target(changed_tomls() | hostile_text, check_toml, 0.5),
    "config tables": Target(
        st.tuples(
            st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3),
            st.lists(overrides, max_size=2),
        ),
        check_tables,
        0.5,
    ),
    "problems.jsonl": Target(lines_of_json, check_jsonl),
    "rows of a run": Target(spoiled_rows(), check_rows, 0.5),
    "teacher answer": Target(answers, check_answer),
    "server request": Target(requests(), check_request),
    "text shown": Target(completions, check_shown),
    "template": Target(st.tuples(hostile_text, hostile_text), check_template),
}
NEEDS = dict.fromkeys(("math", "math, written", "math, classes", "math, any text"), "math_verify")
"""packages that a target needs"""


def close() -> None:
    """End the verifier's process and remove the scratch files."""
    if math_verifier.cache_info().currsize:
        math_verifier().close()
    for folder in scratch_folders:
        folder.cleanup()
    for made in (math_verifier, scratch, finished_run, original):
        made.cache_clear()
    scratch_folders.clear()
