"""The map of when a teacher helps is what its rows say, and so is the table in the package."""

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name: str) -> ModuleType:
    """Import a script; where `sys.modules` has its name, its data classes look for it there."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if name in sys.modules:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def teacher_map():
    return loaded("teacher_map")


@pytest.fixture(scope="module")
def rows(teacher_map):
    cases = tomllib.loads(teacher_map.CASES.read_text(encoding="utf-8"))["case"]
    return [row for case in cases for row in teacher_map.rows_of(case)]


def test_map_and_table_are_made_of_the_rows(teacher_map, rows):
    """After new rows: python benchmarks/teacher_map.py."""
    written = [json.loads(line) for line in teacher_map.MAP.read_text("utf-8").splitlines()]
    assert written == rows
    assert json.loads(teacher_map.TABLE.read_text("utf-8")) == teacher_map.measured_cases(rows)


@pytest.mark.parametrize(
    ("case", "method", "difference"),
    [
        ("puzzles", "trrd", [5.9, 2.5, 9.8]),
        ("puzzles", "sft", [9.8, 5.7, 13.9]),
        ("puzzles, random teacher", "trrd", [-12.3, -16.9, -8.2]),
        ("Sokoban", "opd", [11.4, 7.4, 16.2]),
        ("Sokoban, searched rates", "sft", [13.1, 4.6, 21.2]),
        ("Sokoban, teacher in a hurry", "opd", [-10.3, -17.8, -3.1]),
        ("pictures", "trrd", [2.7, -2.6, 8.9]),
    ],
)
def test_differences_are_those_of_the_reports(rows, case, method, difference):
    """`rlad report` has the problems' keys from the runs; here they are generated again."""
    (row,) = [one for one in rows if (one["case"], one["method"]) == (case, method)]
    assert [100 * one for one in row["minus grpo"]] == pytest.approx(difference, abs=0.051)


def a_run(validation, *, num_correct=(4, 2), seed=0):
    return {
        "seed": seed,
        "num_steps": 40,
        "validation": [{"step": 20 * i, "pass@1": value} for i, value in enumerate(validation)],
        "completion_tokens": 1000.0,
        "teacher_tokens": 0.0,
        "seconds": {"generation": 30.0, "update": 10.0},
        "test_after": {
            "num_samples": 4,
            "num_correct": list(num_correct),
            "mean_completion_tokens": 10.0,
        },
    }


def test_cost_is_what_was_spent_until_the_baseline_was_reached(teacher_map):
    baseline = {0: a_run([0.2, 0.4, 0.6]), 1: a_run([0.2, 0.5, 0.8])}
    early = {0: a_run([0.2, 0.7, 0.5]), 1: a_run([0.2, 0.7, 0.5])}
    never = {0: a_run([0.2, 0.5, 0.69])}

    spent = {"step": 20, "sampled tokens": 500, "teacher tokens": 0, "seconds": 20}
    assert teacher_map.cost(early, baseline) == spent
    assert teacher_map.cost(never, baseline) is None


def test_gated_shares_are_of_the_runs_that_have_them(teacher_map):
    runs = {0: a_run([0.0]), 1: a_run([0.0]) | {"gated_positive": 0.2}}
    runs[2] = a_run([0.0]) | {"gated_positive": 0.4}
    assert teacher_map.gated(runs, "positive") == pytest.approx(0.3)
    assert teacher_map.gated(runs, "negative") is None


def test_pass_at_k_of_two_problems(teacher_map):
    """4 of 4 and 2 of 4: 1 and .5 at one completion, 1 and 1 at four."""
    runs = {0: a_run([0.0])}
    assert teacher_map.passed(runs) == {0: [1.0, 0.5]}
    assert teacher_map.at_4(runs) == 1.0


def test_a_file_of_rows_that_is_not_there_yet_is_left_out(teacher_map):
    assert teacher_map.runs_of("not_yet.jsonl") == {}


# --- the rule -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rule(teacher_map):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "teacher_map", teacher_map)
        patch.setitem(sys.modules, "teacher_rule", ModuleType("teacher_rule"))
        yield loaded("teacher_rule")


def a_case(rule, student, teacher, *, as_good=("opd",), **after):
    return rule.Case("a", "b", student, teacher, after, as_good[0], frozenset(as_good), {})


def test_the_border_by_hand(rule):
    """GRPO closes (.5 - .2) / (1 - .2) and (.8 - .6) / (1 - .6), .4375 in the mean; imitation
    (.8 - .2) / (.9 - .2) of its lead; a teacher without lead says nothing of imitation."""
    cases = [
        a_case(rule, 0.2, 0.9, grpo=0.5, opd=0.8),
        a_case(rule, 0.6, 0.6, grpo=0.8, sft=0.6),
    ]
    assert rule.fitted_border(cases) == pytest.approx(0.4375 / (0.6 / 0.7))


def test_what_is_recommended(rule):
    """Leads of .875 and .375 of what is missing, and one of 4 points."""
    assert rule.recommended(a_case(rule, 0.2, 0.9), 0.5) == ["sft", "opd", "trrd"]
    assert rule.recommended(a_case(rule, 0.2, 0.5), 0.5) == ["trrd", "grpo"]
    assert rule.recommended(a_case(rule, 0.2, 0.24), 0.01) == ["grpo"]


def test_a_hit_is_the_first_measured_method_among_the_best(rule):
    one = a_case(rule, 0.2, 0.9, grpo=0.5, opd=0.8)
    assert rule.is_hit(one, ["sft", "opd"]) is True
    assert rule.is_hit(one, ["grpo", "opd"]) is False
    assert rule.is_hit(one, ["sft"]) is None


def test_a_case_is_judged_by_a_rule_that_has_not_seen_its_group(rule):
    cases = [a_case(rule, 0.2, 0.9, grpo=0.5), a_case(rule, 0.3, 0.9, grpo=0.5)]
    seen = []

    def fit(others):
        seen.append(len(others))
        return lambda case: ["grpo"]

    assert rule.score(cases, fit, "family") == [False, False]
    assert seen == [0, 0]


def test_the_cases_of_the_rule_are_those_of_the_map(rule, rows):
    found = {
        (one.name, method): d for one in rule.load_cases() for method, d in one.to_grpo.items()
    }
    compared = [row for row in rows if (row["case"], row["method"]) in found]
    assert len(compared) > 20
    for row in compared:
        of_rule = found[row["case"], row["method"]]
        assert row["minus grpo"][0] == pytest.approx(of_rule.mean, abs=1e-4)
