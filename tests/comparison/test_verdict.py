"""The verdict of a report follows the interval: ahead, a hint, a tie, behind, no difference."""

import random
from typing import Any

import pytest

from report_runs import write_run
from rlad.comparison.comparable import group_runs
from rlad.comparison.differences import by_problem, problems_table, reach, target_table
from rlad.comparison.figures import Method, baseline_of, with_comparisons
from rlad.comparison.finished_runs import ReportedRun, Run, read_run
from rlad.comparison.looks import looks_of
from rlad.comparison.paper_figures import FORMS, latex_table, write_figures
from rlad.comparison.verdict import verdict
from rlad.config.objective import OBJECTIVE_CONFIGS


def methods_of(
    folder, correct: dict[str, list[list[int]]], keys: list[str] | None = None
) -> tuple[list[Method], Method]:
    """Name -> seeds -> correct completions (of 4) of each problem; `keys` of the problems."""
    read = []
    for name, seeds in correct.items():
        objective = name if name in OBJECTIVE_CONFIGS else "trrd"
        for seed, counts in enumerate(seeds):
            path = write_run(
                folder / name / f"seed-{seed}",
                correct=counts,
                objective=objective,
                seed=seed,
                keys=keys,
            )
            read.append(read_run(ReportedRun(name, path)))
    groups, _ = group_runs([run for run in read if isinstance(run, Run)])
    methods = groups[0].methods
    baseline = baseline_of(methods)
    return with_comparisons(methods, baseline), baseline


def said(folder, correct, keys: list[str] | None = None) -> str:
    methods, baseline = methods_of(folder, correct, keys)
    return "\n".join(f"{lead} {text}".strip() for lead, text in verdict(methods, baseline))


def many(share: float, seeds: int, spread: float = 0.0, problems: int = 40) -> list[list[int]]:
    rng = random.Random(int(1000 * share))
    shifts = [spread * (seed - (seeds - 1) / 2) for seed in range(seeds)]
    return [
        [sum(rng.random() < share + shift for _ in range(4)) for _ in range(problems)]
        for shift in shifts
    ]


def test_a_clear_lead_over_three_seeds_is_established_and_there_is_nothing_to_add(tmp_path):
    text = said(tmp_path, {"grpo": many(0.3, 3), "trrd": many(0.7, 3)})
    assert text.startswith("trrd is ahead of grpo by ")
    assert "This is established" in text and "Next. Use trrd" in text
    assert "What it could have detected. With 3 seeds and 40 test problems" in text


def test_problems_of_one_structure_are_not_counted_as_independent(tmp_path):
    keys = [f"key {i // 2}" for i in range(40)]
    text = said(tmp_path, {"grpo": many(0.3, 3), "trrd": many(0.7, 3)}, keys)
    assert "With 3 seeds and 40 test problems of 20 structures, a true difference" in text
    # Advice is in problems, of which the comparison has 40.
    text = said(tmp_path / "close", {"grpo": many(0.3, 3), "trrd": many(0.4, 3)}, keys)
    assert "test problems instead of 40 would establish it" in text


def test_two_seeds_are_a_hint(tmp_path):
    text = said(tmp_path, {"grpo": many(0.3, 2), "trrd": many(0.7, 2)})
    assert "ahead of grpo by" in text and "a hint, not established: 2 seeds cannot" in text
    assert "established for this task" not in text and "at least 3 seeds" in text


def test_an_interval_that_holds_0_is_no_lead_whatever_p_says(tmp_path):
    """The two seeds of trrd lie far apart: each prompt says "better", other seeds may not."""
    grpo = many(0.3, 2)
    trrd = [[min(4, n + 2) for n in grpo[0]], grpo[1]]
    methods, baseline = methods_of(tmp_path, {"grpo": grpo, "trrd": trrd})
    found = methods[1].to_baseline
    assert found is not None and found.p_value < 0.05 and found.difference.low <= 0
    first = next(iter(verdict(methods, baseline)))[1]
    assert "These data show no method ahead of grpo" in first and "includes 0" in first
    assert "p =" not in first


def test_a_tie_is_said_as_one(tmp_path):
    same = many(0.5, 3)
    text = said(tmp_path, {"grpo": same, "trrd": same})
    assert text.startswith("grpo and trrd end at the same ")
    assert "highest mean" not in text and "practically equal" in text


def test_a_method_behind_and_one_ahead_are_both_named(tmp_path):
    text = said(
        tmp_path,
        {"grpo": many(0.5, 3), "trrd": many(0.8, 3), "sft": many(0.2, 3), "opd": many(0.79, 3)},
    )
    assert "Behind grpo: sft" in text or "behind grpo: sft" in text
    assert "lso ahead of grpo: " in text and "are not distinguishable (" in text


def test_one_method_is_no_comparison(tmp_path):
    text = said(tmp_path, {"trrd": many(0.7, 1)})
    assert "no verdict on the method" in text and "What it could have detected" not in text


def test_wins_losses_and_the_cost_to_the_target_by_hand(tmp_path):
    methods, baseline = methods_of(tmp_path, {"grpo": [[0, 2, 4, 1]], "trrd": [[4, 2, 2, 0]]})
    assert by_problem(methods[1], baseline).tolist() == [1.0, 0.0, -0.5, -0.25]
    (row,) = problems_table(methods, baseline).rows
    assert [cell.text for cell in row] == ["trrd", "1", "1", "2", "1", "1"]
    # Validations of write_run: .125 at step 0, .25 at 2 and .375 at 4 of 4 steps, each of 5 s.
    found = reach(methods[1], 0.25)
    assert found is not None and (found.step, found.seconds) == (2, 10.0)
    assert found.sampled_tokens == pytest.approx(2 * 16 * 5) and reach(methods[1], 0.9) is None
    table = target_table(methods, baseline)
    assert table is not None and "37.5% validation" in table.caption
    # Where the baseline ends at its start, all are there before their first step.
    evaluations: Any = baseline.runs[0].history.evaluations
    evaluations[:] = [row for row in evaluations if row.step == 0]
    assert target_table(methods, baseline) is None


def test_a_method_keeps_its_colour_whatever_is_beside_it():
    alone = looks_of(["trrd"])["trrd"]
    assert looks_of(["sft", "grpo", "trrd"])["trrd"] == alone == looks_of(["trrd", "mine"])["trrd"]
    names = ["grpo", "trrd", "opd", "kdrl", "sft", "a", "b", "c"]
    assert len({look["color"] for look in looks_of(names).values()}) == len(names)
    assert looks_of(names) == looks_of(names[::-1])
    many = looks_of([f"method {i}" for i in range(40)])
    assert len({str(look) for look in many.values()}) == 40


def test_figures_are_vector_files_of_column_width_and_latex_is_escaped(tmp_path):
    correct = {"grpo": many(0.3, 2, problems=6), "50%_of $x$ & y": many(0.6, 2, problems=6)}
    methods, baseline = methods_of(tmp_path / "runs", correct)
    files = write_figures(methods, baseline, tmp_path / "figures")
    names = {path.name for path in files}
    assert {f"{name}.{form}" for name in ("results", "differences") for form in FORMS} <= names
    assert (
        'width="237' in (tmp_path / "figures" / "results.svg").read_text()
    )  # 3.3 inches in points
    first = [path.read_bytes() for path in files]
    assert first == [p.read_bytes() for p in write_figures(methods, baseline, tmp_path / "figures")]
    assert r"50\%\_of \$x\$ \& y & 2 &" in latex_table(methods, baseline)
