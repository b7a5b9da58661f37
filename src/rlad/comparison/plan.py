"""Plan how many seeds and test problems a comparison needs, from a pilot's runs or from the spread
of our own runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlad.errors import UserError
from rlad.runs.directory import EVAL, RunDirectory
from rlad.runs.power import Spread, pilot_spread, problems_needed, seeds_needed, smallest_difference
from rlad.runs.rows import read_history

OUR_SPREAD = Spread(seed=0.032, problem=0.098, both=0.0, completion=0.583)
"""The spread in docs/results/methods.jsonl: seven methods against grpo, five seeds, 200 problems of
knights and knaves, four completions each; root mean squares."""
OUR_SOURCE = (
    "our own comparison of eight methods (docs/results.md: embedded models, one task); another "
    "task may have another spread, so give a --pilot if you have one"
)
SEEDS = (2, 3, 5, 8, 12, 20)
PROBLEMS = (100, 300, 1000, 3000)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a comparison with given seeds and problems can detect, and what a given difference would
    need. Differences are shares."""

    source: str
    spread: Spread
    seeds: int
    problems: int
    completions: int
    wanted: float

    @property
    def sees(self) -> float | None:
        """The smallest difference that it can detect; None with one seed."""
        if min(self.seeds, self.problems) < 2:
            return None
        return smallest_difference(self.spread, self.seeds, self.problems, self.completions)

    @property
    def seeds_needed(self) -> int | None:
        if self.problems < 2:
            return None
        return seeds_needed(self.wanted, self.spread, self.problems, self.completions)

    @property
    def problems_needed(self) -> int | None:
        if self.seeds < 2:
            return None
        return problems_needed(self.wanted, self.spread, self.seeds, self.completions)

    def table(self) -> list[tuple[str, ...]]:
        """Return the smallest detectable differences in points, by seeds and problems."""
        problems = sorted({self.problems, *PROBLEMS} - {1})
        rows = [("seeds", *(f"{n:,} problems" for n in problems))]
        for seeds in sorted({self.seeds, *SEEDS} - {1}):
            found = [smallest_difference(self.spread, seeds, n, self.completions) for n in problems]
            rows.append((str(seeds), *(f"{100 * one:.1f}" for one in found)))
        return rows


def read_pilot(path: Path, baseline: str | None = None) -> tuple[Spread, str] | None:
    """Estimate the spread from a results.jsonl, or from the finished runs at METHOD/seed-N below a
    folder. It is the largest spread of a method's difference to the baseline; None without two
    methods and two common seeds. Raises `UserError` for any other file.
    """
    rows = _rows_of_file(path) if path.is_file() else list(_rows_of_runs(path))
    correct: dict[str, dict[int, list[int]]] = {}
    samples: set[int] = set()
    for row in rows:
        samples.add(row["num_samples"])
        correct.setdefault(row["method"], {})[row["seed"]] = row["num_correct"]
    if len(samples) != 1 or len(correct) < 2:
        return None
    first = (
        baseline if baseline in correct else "grpo" if "grpo" in correct else next(iter(correct))
    )
    found: list[tuple[Spread, str]] = []
    for method in correct:
        seeds = sorted(set(correct[method]) & set(correct[first]))
        tables = [[correct[name][seed] for seed in seeds] for name in (method, first)]
        lengths = {len(row) for table in tables for row in table}
        if method != first and len(seeds) >= 2 and len(lengths) == 1 and min(lengths) >= 2:
            spread = pilot_spread(tables[0], tables[1], next(iter(samples)))
            found.append((spread, f"{path}: {method} and {first}, {len(seeds)} seeds"))
    # Use the largest: a plan for it is sufficient for the others.
    return max(found, key=lambda each: _width(each[0]), default=None)


def _width(spread: Spread) -> float:
    return smallest_difference(spread, 5, 300)


def _rows_of_file(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            {
                "method": str(row["method"]),
                "seed": int(row["seed"]),
                "num_correct": [int(n) for n in row["test_after"]["num_correct"]],
                "num_samples": int(row["test_after"]["num_samples"]),
            }
            for row in lines
        ]
    except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise UserError(
            f"--pilot {path} is not a results.jsonl of a report; give such a file, or the folder "
            "of a comparison."
        ) from None


def _rows_of_runs(folder: Path) -> Sequence[dict[str, Any]]:
    rows = []
    for path in sorted(folder.glob(f"**/seed-*/{EVAL}")):
        run = RunDirectory(path.parent)
        is_tuning = "tuning" in path.parent.relative_to(folder).parts
        if is_tuning or not run.is_finished():
            continue
        tests = [row for row in read_history(run).evaluations if row.split == "test"]
        seed = path.parent.name.removeprefix("seed-")
        if len(tests) > 1 and seed.isdigit():
            results = max(tests, key=lambda row: row.step).results
            rows.append(
                {
                    "method": path.parent.parent.name,
                    "seed": int(seed),
                    "num_correct": [r.num_correct for r in results],
                    "num_samples": results[0].num_samples,
                }
            )
    return rows
