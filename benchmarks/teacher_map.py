"""Make the map of when a teacher helps from the rows of our comparisons (docs/results/cases.toml):

    python benchmarks/teacher_map.py

writes docs/results/map.jsonl (one row for each method of a case), docs/assets/teacher_map.svg and
.pdf, and src/rlad/checks/measured_cases.json, from which `rlad check` shows the nearest cases.
Intervals are those of the reports: 95 %, over seeds and problems. The difference of two methods in
files of rows, on the seeds that both have:

    python benchmarks/teacher_map.py teacher_on.jsonl:trrd_positive methods.jsonl:trrd
"""

import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from rlad.comparison.paper_figures import COLUMN_INCHES, SETTINGS
from rlad.config.run import RunConfig
from rlad.runs.curve import STYLE
from rlad.runs.statistics import Estimate, compare, mean_over_seeds, pass_at_k
from rlad.tasks import make_task

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
CASES = RESULTS / "cases.toml"
MAP = RESULTS / "map.jsonl"
FIGURE = ROOT / "docs" / "assets" / "teacher_map"
TABLE = ROOT / "src" / "rlad" / "checks" / "measured_cases.json"
LOOKS: dict[str, dict[str, Any]] = {
    "sft": {"color": "#c85200", "marker": "s", "linestyle": "--"},
    "opd": {"color": "#595959", "marker": "^", "linestyle": ":"},
    "opd_then_grpo": {"color": "#898989", "marker": "v", "linestyle": (0, (4, 1, 1, 1, 1, 1))},
    "trrd": {"color": "#006ba4", "marker": "o", "linestyle": "-"},
    "kdrl": {"color": "#5f9ed1", "marker": "D", "linestyle": "-."},
}
"""of the methods that are drawn; dark enough on white, and told apart without colours too"""
SIZE: dict[str, Any] = {"linewidth": 1.2, "markersize": 3.8}
Row = dict[str, Any]
BySeed = dict[int, Row]


def main() -> None:
    if sys.argv[1:]:
        print(difference_of(*map(runs_named, two_names(sys.argv[1:]))))
        return
    cases = tomllib.loads(CASES.read_text(encoding="utf-8"))["case"]
    rows = [row for case in cases for row in rows_of(case)]
    for name in sorted({name for case in cases for name in case["rows"]}):
        if not (RESULTS / name).is_file():
            print(f"not there yet: {RESULTS / name}")
    MAP.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    TABLE.write_text(json.dumps(measured_cases(rows), indent=1) + "\n", encoding="utf-8")
    draw(rows)
    print(f"{len(rows)} rows of {len({row['case'] for row in rows})} cases")


# --- rows -----------------------------------------------------------------------------------------


def rows_of(case: Row) -> Iterator[Row]:
    """Yield the map's row of each method of a case."""
    baseline_file, baseline_name = case["baseline"]
    baseline = runs_of(baseline_file)[baseline_name]
    for name in case["rows"]:
        for method, runs in runs_of(name).items():
            shown = case.get("methods", {}).get(method, None if "methods" in case else method)
            if shown and (name, method) != (baseline_file, baseline_name):
                yield row_of(case, shown, runs, baseline)


@cache
def runs_of(name: str) -> dict[str, BySeed]:
    """Return the rows of a results.jsonl's first table by method and seed; none of a file that is
    not there."""
    path = RESULTS / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    runs: dict[str, BySeed] = {}
    for row in map(json.loads, lines):
        if row["table"] == 1:
            runs.setdefault(row["method"], {})[row["seed"]] = row
    return runs


def two_names(said: Sequence[str]) -> Sequence[str]:
    if len(said) != 2:
        sys.exit(f"name two methods, each as FILE:METHOD; these are {len(said)}.")
    return said


def runs_named(name: str) -> BySeed:
    """Return the rows of `FILE:METHOD`."""
    file, _, method = name.partition(":")
    methods = runs_of(file)
    if method not in methods:
        known = ", ".join(methods) or "no rows"
        sys.exit(f"{name}: {RESULTS / file} has {known}; name a method as FILE:METHOD.")
    return methods[method]


def difference_of(runs: BySeed, baseline: BySeed) -> str:
    """Say by how much one method is ahead of another in test pass@1, with its interval."""
    first = runs[min(runs)]
    keys = keys_of(json.dumps(task_of(first)), len(num_correct(first)))
    found = compare(passed(runs), passed(baseline), keys, limits=(-1, 1))
    mean, low, high = (100 * one for one in estimate(found.difference))
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}], p = {found.p_value:.3f} (not corrected)"


def row_of(case: Row, method: str, runs: BySeed, baseline: BySeed) -> Row:
    first = runs[min(runs)]
    keys = keys_of(json.dumps(task_of(first)), len(first["test_after"]["num_correct"]))
    found = compare(passed(runs), passed(baseline), keys, limits=(-1, 1))
    seeds = sorted(set(runs) & set(baseline))
    same_seeds = {seed: baseline[seed] for seed in seeds}
    before = fmean(run["test_before"]["pass@k"]["1"]["mean"] for run in runs.values())
    teacher = case.get("teacher")
    pass_at_1 = {seed: fmean(values) for seed, values in passed(runs).items()}
    return {
        "case": case["name"],
        "family": case["family"],
        "student": round(before, 4),
        "teacher": teacher,
        "lead": None if teacher is None else round(teacher - before, 4),
        "method": method,
        "seeds": sorted(runs),
        "pass@1": estimate(mean_over_seeds(list(passed(runs).values()), keys, limits=(0, 1))),
        "sd over seeds": round(stdev(pass_at_1.values()), 4) if len(runs) > 1 else None,
        "minus grpo": estimate(found.difference),
        "grpo": round(fmean(fmean(values) for values in passed(same_seeds).values()), 4),
        "p": round(found.p_value, 4),
        "pass@4": {
            "before": round(first["test_before"]["pass@k"]["4"]["mean"], 4),
            "grpo": at_4(same_seeds),
            "method": at_4(runs),
            "minus grpo": estimate(
                compare(passed(runs, 4), passed(baseline, 4), keys, limits=(-1, 1)).difference
            ),
        },
        "tokens": {name: tokens(rows) for name, rows in (("method", runs), ("grpo", same_seeds))},
        "gated": {sign: gated(runs, sign) for sign in ("positive", "negative")},
        "to grpo's end": cost(runs, same_seeds),
        "learning rate": first["settings"]["optimization.learning_rate"],
        "source": case["source"],
    }


def task_of(run: Row) -> Row:
    keys = run["settings"].items()
    return {key.removeprefix("task."): value for key, value in keys if key.startswith("task.")}


@cache
def keys_of(task: str, num_problems: int) -> list[str]:
    """Return what makes test problems variants of one another, which rows do not hold: it is
    generated again. Problems of a file count as independent."""
    table = json.loads(task)
    if table["type"] == "jsonl":
        return [str(i) for i in range(num_problems)]
    sections = {"task": table, "student": {"model": "any"}, "objective": {"type": "grpo"}}
    made = make_task(**RunConfig.model_validate(sections).task.model_dump())
    keys = [made.problem("test", i).key for i in range(num_problems)]
    made.close()
    return keys


def passed(runs: BySeed, k: int = 1) -> dict[int, list[float]]:
    """Return seed -> pass@k of each test problem."""
    return {
        seed: [pass_at_k(run["test_after"]["num_samples"], n, k) for n in num_correct(run)]
        for seed, run in runs.items()
    }


def num_correct(run: Row) -> list[int]:
    return run["test_after"]["num_correct"]


def at_4(runs: BySeed) -> float:
    return round(fmean(fmean(values) for values in passed(runs, 4).values()), 4)


def tokens(runs: BySeed) -> float:
    """Mean length of a test completion after training."""
    return round(fmean(run["test_after"]["mean_completion_tokens"] for run in runs.values()), 1)


def gated(runs: BySeed, sign: str) -> float | None:
    """Share of the tokens with this sign of the advantage that was gated, mean over steps and over
    the runs whose rows have it (older ones have not)."""
    found = [run.get(f"gated_{sign}") for run in runs.values()]
    known = [share for share in found if share is not None]
    return round(fmean(known), 4) if known else None


def cost(runs: BySeed, baseline: BySeed) -> Row | None:
    """Find the first validation at which the mean over seeds is where GRPO ends, and what had been
    spent by then, as if every step cost the same; None where that is never reached."""
    goal = fmean(run["validation"][-1]["pass@1"] for run in baseline.values())
    for place, point in enumerate(next(iter(runs.values()))["validation"]):
        if fmean(run["validation"][place]["pass@1"] for run in runs.values()) >= goal:
            share = point["step"] / next(iter(runs.values()))["num_steps"]
            return {
                "step": point["step"],
                "sampled tokens": spent(share, [run["completion_tokens"] for run in runs.values()]),
                "teacher tokens": spent(share, [run["teacher_tokens"] for run in runs.values()]),
                "seconds": spent(share, [sum(run["seconds"].values()) for run in runs.values()]),
            }
    return None


def spent(share: float, totals: Sequence[float | None]) -> int | None:
    """Return a share of the mean total of a run; None where a run has not counted it."""
    known = [total for total in totals if total is not None]
    return round(share * fmean(known)) if len(known) == len(totals) else None


def estimate(found: Estimate) -> list[float]:
    return [round(one, 4) for one in (found.mean, found.low, found.high)]


def measured_cases(rows: Sequence[Row]) -> list[Row]:
    """Return what `rlad check` shows: of each case with a teacher the methods of their own name."""
    cases: dict[str, Row] = {}
    for row in rows:
        if row["teacher"] is None or "," in row["method"]:
            continue
        about = {key: row[key] for key in ("case", "family", "student", "teacher", "source")}
        case = cases.setdefault(row["case"], about | {"grpo": row["grpo"], "methods": {}})
        case["methods"][row["method"]] = {
            "pass@1": row["pass@1"][0],
            "minus grpo": row["minus grpo"],
            "seeds": len(row["seeds"]),
        }
    return list(cases.values())


# --- figure ---------------------------------------------------------------------------------------


def draw(rows: Sequence[Row]) -> None:
    """Draw the differences to GRPO with their intervals, cases by the teacher's lead."""
    shown = [row for row in rows if row["teacher"] is not None and row["method"] in LOOKS]
    names = sorted(
        dict.fromkeys(row["case"] for row in shown), key=lambda name: -round(lead(shown, name), 2)
    )
    with matplotlib.style.context([*STYLE, SETTINGS]):
        figure = Figure(figsize=(COLUMN_INCHES, 0.48 * len(names) + 0.9), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(names):
            methods = [row for row in shown if row["case"] == name]
            methods.sort(key=lambda row: list(LOOKS).index(row["method"]))
            for number, row in enumerate(methods):
                mean, low, high = (100 * one for one in row["minus grpo"])
                y = place + 0.17 * (number - (len(methods) - 1) / 2)
                look: dict[str, Any] = LOOKS[row["method"]] | SIZE
                look["markerfacecolor"] = look["color"] if low > 0 or high < 0 else "white"
                axes.plot([low, mean, high], [y] * 3, markevery=[1], **look)
        for place in range(1, len(names)):
            axes.axhline(place - 0.5, color="0.85", linewidth=0.6)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), [label(shown, name) for name in names])
        axes.set(xlabel="points above GRPO", ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        for method, look in LOOKS.items():
            axes.plot([], [], label=method, **look, **SIZE)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        for form, date in (("svg", "Date"), ("pdf", "CreationDate")):
            figure.savefig(FIGURE.with_suffix(f".{form}"), metadata={date: None})


def lead(rows: Sequence[Row], case: str) -> float:
    return next(row["lead"] for row in rows if row["case"] == case)


def label(rows: Sequence[Row], case: str) -> str:
    row = next(row for row in rows if row["case"] == case)
    seeds = max(len(one["seeds"]) for one in rows if one["case"] == case)
    rates = f"{100 * row['student']:.0f} → {100 * row['teacher']:.0f}"
    return f"{case.replace(', ', chr(10))}\n{rates}, {seeds} seeds"


if __name__ == "__main__":
    main()
