"""Does a rule predict which method is worth trying? Tried on measured cases that it has not seen:

    python benchmarks/teacher_rule.py

The rule knows pass@1 of student S and teacher T. Who imitates closes about a share i of the lead
T - S, who follows the reward about a share g of what is missing, 1 - S. So: no lead, no teacher;
imitate where (T - S) / (1 - S) is above g / i; else TRRD, which takes of a teacher what the reward
bears out. g and i are means over the cases that are not left out. A recommendation is a hit where
the interval of the best method's difference to it holds 0. Cases of one task share students and
GRPO runs: they are no independent observations, so the interval is too short if anything.
"""

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats
from teacher_map import CASES, BySeed, keys_of, passed, runs_of, task_of

from rlad.runs.statistics import Estimate, compare

SMALL_LEAD = 0.05
IMITATION = ("sft", "opd")


@dataclass(frozen=True, slots=True)
class Case:
    """What was measured with one student, teacher and task."""

    name: str
    family: str
    student: float
    teacher: float
    after: dict[str, float]
    """pass@1 by method, grpo among them"""
    best: str
    """the method with the highest difference to grpo, on the seeds that both have"""
    as_good: frozenset[str]
    """methods whose distance to the best one is within its interval, the best among them"""
    to_grpo: dict[str, Estimate]

    @property
    def lead(self) -> float:
        """The teacher's lead as a share of what the student lacks."""
        return (self.teacher - self.student) / (1 - self.student)


Rule = Callable[[Case], list[str]]
"""Names the methods worth trying, the best first."""


def fitted_border(cases: Sequence[Case]) -> float:
    """Return g / i, the relative lead above which imitation is expected to be ahead of GRPO."""
    by_reward = [(one.after["grpo"] - one.student) / (1 - one.student) for one in cases]
    by_imitation = [
        (one.after[name] - one.student) / (one.teacher - one.student)
        for one in cases
        for name in IMITATION
        if name in one.after and one.teacher - one.student > SMALL_LEAD
    ]
    return fmean(by_reward) / fmean(by_imitation)


def recommended(case: Case, border: float) -> list[str]:
    if case.teacher - case.student <= SMALL_LEAD:
        return ["grpo"]
    return [*IMITATION, "trrd"] if case.lead > border else ["trrd", "grpo"]


def is_hit(case: Case, names: Sequence[str]) -> bool | None:
    """Say whether the first of the methods that was measured is as good as the best; None where
    none was."""
    measured = [name for name in names if name in case.after]
    return measured[0] in case.as_good if measured else None


def score(cases: Sequence[Case], fit: Callable[[list[Case]], Rule], by: str) -> list[bool | None]:
    """Judge the recommendation for each case by a rule that has seen no case of its group: `by` is
    `name` or `family`."""
    return [
        is_hit(one, fit([c for c in cases if getattr(c, by) != getattr(one, by)])(one))
        for one in cases
    ]


def signs(cases: Sequence[Case], by: str) -> tuple[int, int, int]:
    """Count the differences to GRPO whose interval leaves 0 out, those that the rule gives the
    right sign, and those that are above 0."""
    right, above, number = 0, 0, 0
    for one in cases:
        border = fitted_border([c for c in cases if getattr(c, by) != getattr(one, by)])
        has_lead = one.teacher - one.student > SMALL_LEAD
        for name in ("trrd", *IMITATION):
            found = one.to_grpo.get(name)
            if found is None or found.low <= 0 <= found.high:
                continue
            is_expected = has_lead and (name == "trrd" or one.lead > border)
            number += 1
            right += is_expected == (found.mean > 0)
            above += found.mean > 0
    return number, right, above


# --- the cases ------------------------------------------------------------------------------------


def load_cases() -> list[Case]:
    """Read the cases that have a teacher; variants of a method are left out."""
    found = {}
    for case in tomllib.loads(CASES.read_text(encoding="utf-8"))["case"]:
        if "teacher" not in case or case["name"] in found:
            continue
        file, name = case["baseline"]
        methods = {"grpo": runs_of(file)[name]}
        for rows in case["rows"]:
            shown = case.get("methods") or {method: method for method in runs_of(rows)}
            for method, runs in runs_of(rows).items():
                if method in shown:
                    methods.setdefault(shown[method], runs)
        found[case["name"]] = case_of(case, methods)
    return list(found.values())


def case_of(case: dict, methods: dict[str, BySeed]) -> Case:
    first = next(iter(methods["grpo"].values()))
    keys = keys_of(json.dumps(task_of(first)), len(first["test_after"]["num_correct"]))
    values = {name: passed(runs) for name, runs in methods.items()}

    def minus(name: str, other: str) -> Estimate:
        """Compare on the seeds that both have."""
        return compare(values[name], values[other], keys, limits=(-1, 1)).difference

    to_grpo = {name: minus(name, "grpo") for name in values if name != "grpo"}
    above = {name: found.mean for name, found in to_grpo.items()} | {"grpo": 0.0}
    best = max(above, key=lambda name: above[name])
    behind = {name for name in values if name != best and minus(best, name).low > 0}
    return Case(
        name=case["name"],
        family=case["family"],
        student=first["test_before"]["pass@k"]["1"]["mean"],
        teacher=case["teacher"],
        after={name: fmean(map(fmean, one.values())) for name, one in values.items()},
        best=best,
        as_good=frozenset(values) - behind,
        to_grpo=to_grpo,
    )


# --- what came out --------------------------------------------------------------------------------


def with_interval(hits: Sequence[bool]) -> str:
    found = stats.binomtest(sum(hits), len(hits)).proportion_ci(method="exact")
    return f"{sum(hits)} of {len(hits)} [{found.low:.0%}, {found.high:.0%}]"


def main() -> None:
    cases = load_cases()
    rules: dict[str, Callable[[list[Case]], Rule]] = {
        "the rule": lambda seen: lambda case: recommended(case, fitted_border(seen)),
        **{
            f"always {name}": lambda seen, name=name: lambda case: [name]
            for name in ("grpo", "trrd", "opd", "sft")
        },
    }
    print("| case | lead / missing | recommended | best | hit |\n|---|---|---|---|---|")
    for one in cases:
        border = fitted_border([c for c in cases if c.family != one.family])
        names = recommended(one, border)
        first = next(name for name in names if name in one.after)
        hit = "yes" if is_hit(one, names) else "no"
        print(
            f"| {one.name} | {one.lead:+.2f} (border {border:.2f}) | {first} | {one.best} | {hit} |"
        )
    for by in ("name", "family"):
        ours = score(cases, rules["the rule"], by)
        print(f"\nleft out: one {'case' if by == 'name' else 'task'} at a time")
        print("| rule | hits | the rule, same cases | p |\n|---|---|---|---|")
        for title, fit in rules.items():
            theirs = score(cases, fit, by)
            pairs = [
                (a, b) for a, b in zip(theirs, ours, strict=True) if a is not None and b is not None
            ]
            only_ours = sum(b and not a for a, b in pairs)
            only_theirs = sum(a and not b for a, b in pairs)
            changed = only_ours + only_theirs
            p = stats.binomtest(only_ours, changed).pvalue if changed else 1.0
            print(
                f"| {title} | {with_interval([a for a, _ in pairs])} | "
                f"{with_interval([b for _, b in pairs])} | {p:.2f} |"
            )
        number, right, above = signs(cases, by)
        print(
            f"signs of {number} differences that leave 0 out: the rule {right}, "
            f"always ahead {above}, always behind {number - above}"
        )


if __name__ == "__main__":
    main()
