"""The report: its numbers against an independent computation, what is missing, what is not
comparable, hostile text."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import rlad
from report_runs import sample_row, write_run
from rlad.cli.main import main
from rlad.cli.report import report_runs
from rlad.comparison.comparable import group_runs
from rlad.comparison.figures import baseline_of, with_comparisons
from rlad.comparison.finished_runs import MissingRun, ReportedRun, Run, read_run
from rlad.comparison.imitation_map import ENVIRONMENT, FATES, MOST_TOKENS, imitation_maps
from rlad.comparison.report import (
    ComparisonFile,
    markdown,
    read_comparison_file,
    write_files,
    write_report,
)
from rlad.engines.imitation import FATES as RECORDED_FATES
from tiny_runs import OFTEN_CORRECT, run_config

CORRECT = {
    ("grpo", 0): [0, 1, 2, 3, 4, 0],
    ("grpo", 1): [1, 1, 2, 2, 4, 0],
    ("grpo", 2): [0, 0, 3, 3, 4, 1],
    ("trrd", 0): [4, 3, 4, 4, 4, 2],
    ("trrd", 1): [3, 3, 4, 4, 4, 4],
    ("trrd", 2): [4, 4, 4, 4, 3, 3],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[ReportedRun]:
    root = tmp_path_factory.mktemp("runs")
    return [
        ReportedRun(
            m,
            write_run(
                root / m / f"seed-{s}", correct=c, objective=m, seed=s, before=[1] * 6, ood=[0, s]
            ),
        )
        for (m, s), c in CORRECT.items()
    ]


def report(
    runs: list[ReportedRun], folder: Path, **more: Any
) -> tuple[str, str, list[dict[str, Any]]]:
    """HTML, Markdown and the rows of results.jsonl."""
    write_report(runs, folder, **more)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return (folder / "report.html").read_text(), (folder / "report.md").read_text(), rows


def table(text: str, caption: str) -> dict[str, dict[str, str]]:
    """method -> column -> field of a table of report.md."""
    lines = text[text.index(f"**{caption}") :].splitlines()[2:]
    fields = [
        [f.strip() for f in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[: lines.index("")]
    ]
    return {row[0]: dict(zip(fields[0], row, strict=True)) for row in fields[2:]}


def cells(text: str) -> list[set[int]]:
    """Of each table of report.md the numbers of cells of its rows; an escaped pipe parts none."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in block.splitlines()} for block in blocks
    ]


# --- numbers --------------------------------------------------------------------------------------


def test_figures_equal_an_independent_computation(runs, tmp_path):
    _, text, rows = report(runs, tmp_path)
    results = table(text, "Test pass@1")
    detail = table(text, "Test after training")
    for method in ("grpo", "trrd"):
        counts = np.array([c for (m, _), c in CORRECT.items() if m == method]) / 4
        assert results[method]["seeds"] == "3" and results[method]["before"] == "25.0%"
        assert results[method]["after"].startswith(f"{100 * counts.mean():.1f}% [")
        assert results[method]["sd over seeds"] == f"{100 * counts.mean(axis=1).std(ddof=1):.1f}"
        assert results[method]["gain"].startswith(f"{100 * (counts.mean() - 0.25):+.1f} [")
        assert detail[method]["2 people"].startswith(f"{100 * counts[:, 0::2].mean():.1f}% [")
        assert detail[method]["pass@4"].startswith(f"{100 * (counts > 0).mean():.1f}% [")
        assert detail[method]["out of distribution"].startswith(
            f"{100 * (0 + 1 + 2) / 3 / 8:.1f}% ["
        )
        assert (detail[method]["tokens"], detail[method]["truncated"]) == (
            "12.5",
            f"{100 / 6 / 4:.1f}%",
        )
    assert results["grpo"]["minus grpo"] == "baseline"
    assert results["trrd"]["minus grpo"].startswith("+47.2 [+")  # (65 - 31) / 72
    assert [(row["method"], row["seed"], row["test_after"]["num_correct"]) for row in rows] == [
        (m, s, c) for (m, s), c in CORRECT.items()
    ]
    assert rows[0]["test_after"]["pass@k"]["4"]["mean"] == pytest.approx(4 / 6)
    assert rows[0]["settings"]["optimization.num_steps"] == 4


def test_p_value_is_exact_for_few_problems_and_corrected_for_the_comparisons(runs, tmp_path):
    """Of the 2^6 ways to exchange the methods the share that is as good as what was found,
    doubled."""
    _, text, _ = report(runs, tmp_path)
    means = {
        m: np.mean([c for (n, _), c in CORRECT.items() if n == m], axis=0) for m in ("grpo", "trrd")
    }
    difference = means["trrd"] - means["grpo"]
    signs = np.array(np.meshgrid(*[[1, -1]] * 6)).reshape(6, -1)
    share = np.mean(difference @ signs >= difference.sum() - 1e-9)
    row = table(text, "Test pass@1")["trrd"]
    assert float(row["p"]) == pytest.approx(2 * share, abs=6e-4) and row["p, Holm"] == row["p"]


def test_cost(runs, tmp_path):
    """4 steps of 2 + .5 + 1 + 1.5 seconds, 2 x 8 rollouts of 5 tokens, teacher tokens .1 + .2 + .3
    + .4."""
    _, text, rows = report(runs, tmp_path)
    row = table(text, "Cost")["trrd"]
    assert [
        row[c] for c in ("steps", "seconds", "s / step", "generation", "teacher", "update", "rest")
    ] == [*("4", "20", "5.00", "40.0%", "20.0%", "30.0%", "10.0%")]
    assert row["sampled tokens"] == "320" and "inside the update" not in text
    assert rows[0]["teacher_tokens"] == pytest.approx(1.0) and rows[0]["peak_memory_bytes"] == 0.4


def test_gated_shares(tmp_path):
    """.1, .2, .3 and .4 by step; the other run has not recorded them."""
    shares = ("objective/gated_positive/frac", "objective/gated_negative/frac")
    a = write_run(tmp_path / "a", correct=[1, 2], metrics=shares)
    b = write_run(tmp_path / "b", correct=[1, 2], objective="sft", metrics=())
    _, text, rows = report([ReportedRun("trrd", a), ReportedRun("sft", b)], tmp_path / "out")
    differ = table(text, "How the methods differ")
    assert differ["trrd"]["gated, advantage > 0"] == "25.0%"
    assert differ["sft"]["gated, advantage < 0"] == "–"
    assert [row["gated_negative"] for row in rows] == [pytest.approx(0.25), None]


def test_the_report_is_the_same_again(runs, tmp_path):
    assert report(runs, tmp_path / "a") == report(runs, tmp_path / "b")


def test_a_real_run(world, tmp_path):
    """What the engine writes is what the report reads, the imitation map included."""
    config = run_config(
        world,
        tmp_path / "trrd" / "seed-0",
        objective={"type": "trrd"},
        rollout={"temperature": 2.0},
        task=OFTEN_CORRECT,
    )
    rlad.train(config)
    page = report_runs([str(tmp_path / "trrd")], str(tmp_path / "out")).read_text()
    assert ", with one seed: a gain of" in page and 'class="completion"' in page
    assert {fate.letter for fate in (*FATES, ENVIRONMENT)} == set(RECORDED_FATES)

    printed = CliRunner().invoke(
        main, ["report", str(tmp_path / "trrd"), "--output", str(tmp_path / "again")]
    )
    assert "with one seed: a gain of" in printed.output and "sd over seeds" in printed.output
    assert printed.output.endswith(f"report  {tmp_path / 'again' / 'report.html'}\n")


# --- words ----------------------------------------------------------------------------------------


def test_the_first_paragraph_says_what_came_out(runs, tmp_path):
    page, text, _ = report(
        runs, tmp_path, title="Two methods", notes=["Learning rates were chosen on validation."]
    )
    first = text.splitlines()[2]
    assert text.startswith("# Two methods\n")
    assert (
        first.startswith("trrd is ahead of grpo by 47.2 points [")
        and "it solves 90.3% [" in first
        and "grpo 43.1% [" in first
        and "over 3 seeds." in first
    )
    assert (
        "Learning rates were chosen on validation." in page
        and "Learning rates were chosen on validation." in text
    )
    assert (
        "Selection: the validation split (2 problems x 1 completions)" in page
        and "(6 problems x 4 completions)" in page
    )
    assert "Fewer than 3 seeds" not in page


def test_the_splits_say_what_chose_what(runs, tmp_path):
    told = "before training and after the last step, not the best checkpoint."
    page, text, _ = report(runs, tmp_path, notes=["trrd: 1e-05"])
    for form in (page, text):
        assert (
            "best checkpoint of a run, and selected the learning rates (see the notes). Report: "
            "the test split" in form
        )
        assert told in form
    page, text, _ = report(runs, tmp_path)
    assert "learning rates" not in page + text and told in page and told in text


def test_no_verdict_without_evidence(tmp_path):
    a = write_run(tmp_path / "a", correct=[4, 0, 4, 0, 2], objective="grpo")
    b = write_run(tmp_path / "b", correct=[0, 4, 4, 1, 2])
    _, text, _ = report([ReportedRun("grpo", a), ReportedRun("trrd", b)], tmp_path / "out")
    assert (
        "with one seed. These data show no method ahead of grpo: the difference of trrd is +5.0 "
        "points" in text
    )


def test_few_seeds_are_said(runs, tmp_path):
    page, text, _ = report([*runs[:3], *runs[3:5]], tmp_path)
    assert (
        "Fewer than 3 seeds: trrd (2)." in page
        and "> **Warning.** Fewer than 3 seeds: trrd (2)." in text
    )
    assert (
        "2 shared seed(s)" not in table(text, "Test pass@1")["trrd"]["minus grpo"]
    )  # all of its seeds
    _, text, _ = report([*runs[:2], *runs[3:]], tmp_path)
    assert table(text, "Test pass@1")["trrd"]["minus grpo"].endswith("2 shared seed(s)")


# --- missing, and not comparable ------------------------------------------------------------------


def test_missing_runs_do_not_take_the_others_down(runs, tmp_path):
    unfinished = write_run(
        tmp_path / "kdrl", correct=[1] * 6, objective="kdrl", seed=4, finished=False
    )
    broken = write_run(tmp_path / "broken", correct=[1] * 6)
    (broken / "eval.jsonl").write_text('{"step": 0}\n')
    nothing = tmp_path / "nothing"
    extra = [
        ReportedRun("kdrl", unfinished),
        ReportedRun("opd", broken),
        ReportedRun("gkd", nothing),
    ]
    page, text, rows = report(
        [*runs, *extra], tmp_path / "out", missing=[MissingRun("rlsd", 3, "killed by SIGKILL")]
    )
    missing = {
        row["method"]: row for row in table(text, "Runs that are not in the tables").values()
    }
    assert missing["rlsd"] == {"method": "rlsd", "seed": "3", "why": "killed by SIGKILL"}
    assert missing["kdrl"]["seed"] == "4" and "not finished: 2 of 4 steps" in missing["kdrl"]["why"]
    assert "cannot be read: row 1 of eval.jsonl, split: Field required." in missing["opd"]["why"]
    assert missing["opd"]["seed"] == "0" and "holds no run" in missing["gkd"]["why"]
    assert (
        list(table(text, "Test pass@1")) == ["grpo", "trrd"]
        and len(rows) == 6
        and "killed by SIGKILL" in page
    )


def test_nothing_but_missing_runs(tmp_path):
    page, text, rows = report(
        [], tmp_path, missing=[MissingRun("trrd", 0, "out of memory")], baseline="trrd"
    )
    assert "No run came to its end" in page and "out of memory" in text and rows == []


def test_what_is_missing_is_returned(runs, tmp_path):
    """Those that were known before, those that cannot be read, and doubles: as many as the report
    lists."""
    given = MissingRun("rlsd", 3, "killed by SIGKILL")
    gone = ReportedRun("opd", tmp_path / "gone")
    double = ReportedRun("trrd", write_run(tmp_path / "again", correct=[4] * 6, ood=[0, 0]))
    missing = write_report([*runs, gone, double], tmp_path / "out", missing=[given])
    assert [(m.method, m.seed) for m in missing] == [
        ("rlsd", 3),
        ("opd", None),
        ("trrd", 0),
    ] and missing[0] == given
    assert write_report(runs, tmp_path / "out") == []


def damage(
    folder: Path, name: str, row: int, change: dict[str, Any], *, of_result: bool = False
) -> None:
    """Change a row of a file, or the first result in it; None takes a key away."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    place = rows[row]["results"][0] if of_result else rows[row]
    place.update(change)
    for key in [key for key, value in change.items() if value is ...]:
        del place[key]
    (folder / name).write_text("".join(json.dumps(each) + "\n" for each in rows))


AFTER = 3  # row of the test after training in eval.jsonl


@pytest.mark.parametrize(
    ("name", "row", "change", "of_result", "why"),
    [
        (
            "metrics.jsonl",
            1,
            {"step": ...},
            False,
            "row 2 of metrics.jsonl, step: Field required",
        ),
        (
            "metrics.jsonl",
            1,
            {"step": 3},
            False,
            "metrics.jsonl lacks step 2: restore a copy",
        ),
        (
            "metrics.jsonl",
            0,
            {"time/update/seconds": None},
            False,
            "row 1 of metrics.jsonl, time/update/seconds: Input should",
        ),
        (
            "metrics.jsonl",
            0,
            {"rollout/completion_tokens/mean": "5"},
            False,
            "rollout/completion_tokens/mean: Input should",
        ),
        ("eval.jsonl", 0, {"step": -1}, False, "row 1 of eval.jsonl, step: Input should"),
        (
            "eval.jsonl",
            AFTER,
            {"step": 10**400},
            False,
            "row 4 of eval.jsonl, step: Input should be less than",
        ),
        ("eval.jsonl", 0, {"results": []}, False, "row 1 of eval.jsonl, results: List should have"),
        (
            "eval.jsonl",
            2,
            {"pass@1": {"mean": None}},
            False,
            "row 3 of eval.jsonl, pass@1.mean: Input should",
        ),
        ("eval.jsonl", AFTER, {"split": "other"}, False, "lacks the test before or after training"),
        (
            "eval.jsonl",
            AFTER,
            {"mean_completion_tokens": "long"},
            True,
            "results.0.mean_completion_tokens: Input should",
        ),
        (
            "eval.jsonl",
            AFTER,
            {"mean_completion_tokens": math.nan},
            True,
            "results.0.mean_completion_tokens: Input should be",
        ),
        (
            "eval.jsonl",
            AFTER,
            {"num_samples": 0},
            True,
            "results.0.num_samples: Input should be greater than or equal to 1",
        ),
        (
            "eval.jsonl",
            AFTER,
            {"num_correct": 99},
            True,
            "problem 0 has counts that 4 samples cannot have",
        ),
        (
            "eval.jsonl",
            AFTER,
            {"num_truncated": -1},
            True,
            "results.0.num_truncated: Input should be greater than or equal to 0",
        ),
        (
            "eval.jsonl",
            AFTER,
            {"key": "another"},
            True,
            "the test problems in eval.jsonl are not the same before and after",
        ),
        ("eval.jsonl", AFTER, {"step": 5}, False, "has an evaluation of step 5, but the run has 4"),
    ],
)
def test_a_damaged_run_is_missing(runs, tmp_path, name, row, change, of_result, why):
    folder = write_run(tmp_path / "run", correct=[1, 2], seed=5)
    damage(folder, name, row, change, of_result=of_result)
    missing = read_run(ReportedRun("trrd", folder))
    assert isinstance(missing, MissingRun) and missing.seed == 5 and why in missing.reason, missing
    assert missing.reason.startswith(f"{folder} cannot be read: ") and missing.reason.endswith(".")


def test_a_test_of_another_number_of_samples_makes_a_run_missing(tmp_path):
    folder = write_run(tmp_path / "run", correct=[1, 2], num_samples=8)
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("samples = 8", "samples = 4"))
    missing = read_run(ReportedRun("trrd", folder))
    assert isinstance(missing, MissingRun) and "have not 4 samples each" in missing.reason


def test_unequal_numbers_of_problems_and_broken_lines_make_a_run_missing(runs, tmp_path):
    unequal = write_run(tmp_path / "unequal", correct=[1, 2], before=[1])
    broken = write_run(tmp_path / "broken", correct=[1, 2])
    (broken / "eval.jsonl").write_text('{"step": \n')
    unlike = write_run(tmp_path / "unlike", correct=[1, 2])
    (unlike / "metrics.jsonl").write_text("[]\n")
    damaged = [ReportedRun("kdrl", folder) for folder in (unequal, broken, unlike)]
    _, text, rows = report([*runs, *damaged], tmp_path / "out")
    assert len(rows) == 6
    for why in (
        "are not the same before and after training",
        "broken cannot be read: row 1 of eval.jsonl is not a JSON object",
        "unlike cannot be read: row 1 of metrics.jsonl is not a JSON object",
    ):
        assert why in text


def test_a_figure_that_is_not_finite_is_not_recorded(tmp_path):
    folder = write_run(tmp_path / "run", correct=[1, 2])
    damage(
        folder,
        "metrics.jsonl",
        0,
        {"reward/mean": math.nan, "objective/ratio/max": math.inf, "teacher/tokens/count": 1e308},
    )
    (run,) = loaded([ReportedRun("trrd", folder)])
    assert (
        not {"reward/mean", "objective/ratio/max", "teacher/tokens/count"} & set(run.steps[0])
        and "reward/mean" in run.steps[1]
    )


@pytest.mark.parametrize(
    ("sections", "difference"),
    [
        ({"optimization": {"num_steps": 9}}, "optimization.num_steps: 4 and 9"),
        (
            {"optimization": {"num_steps": 4, "max_seconds": 5.0}},
            "optimization.max_seconds: none and 5.0",
        ),
        ({"task": {"num_people": [2]}}, "task.num_people: [2, 3] and [2]"),
        ({"keys": list("abcdef")}, "the held-out problems themselves"),
    ],
)
def test_other_tasks_and_budgets_get_a_table_of_their_own(runs, tmp_path, sections, difference):
    other = write_run(tmp_path / "other", correct=[4] * 6, ood=[0, 0], **sections)
    page, text, rows = report([*runs, ReportedRun("trrd", other)], tmp_path / "out")
    assert (
        "Not one comparison." in page
        and "Table 2 is not comparable with table 1" in text
        and difference in text
    )
    assert [row["table"] for row in rows] == [1] * 6 + [2]
    assert text.count("**Test pass@1") == 2


def test_settings_of_methods_and_machines_are_compared(tmp_path):
    """Same name, another alpha, learning rate or sampler: methods of their own; another device: the
    same."""
    given: list[dict[str, Any]] = [
        {"objective": {"type": "trrd", "alpha": 0.5}},
        {"objective": {"type": "trrd", "alpha": 0.5}, "seed": 1, "student": {"device": "cpu"}},
        {"objective": {"type": "trrd", "alpha": 0.9}},
        {"objective": {"type": "trrd", "alpha": 0.5}, "optimization": {"learning_rate": 1e-3}},
        {"objective": {"type": "trrd", "alpha": 0.5}, "rollout": {"engine": "vllm"}},
    ]
    paths = [
        write_run(tmp_path / str(i), correct=[1, 2], **settings) for i, settings in enumerate(given)
    ]
    groups, _ = group_runs(loaded([ReportedRun("trrd", path) for path in paths]))
    names = [(m.name, m.seeds) for m in groups[0].methods]
    assert len(groups) == 1 and names == [
        ("trrd (alpha = 0.5, learning_rate = 1e-06, engine = native)", [0, 1]),
        ("trrd (alpha = 0.9, learning_rate = 1e-06, engine = native)", [0]),
        ("trrd (alpha = 0.5, learning_rate = 0.001, engine = native)", [0]),
        ("trrd (alpha = 0.5, learning_rate = 1e-06, engine = vllm)", [0]),
    ]


def test_a_second_run_of_a_seed_is_left_out(runs, tmp_path):
    double = write_run(tmp_path / "again", correct=[4] * 6, ood=[0, 0])
    _, text, _ = report([*runs, ReportedRun("trrd", double)], tmp_path / "out")
    assert (
        "is a second run of this method and seed" in text
        and table(text, "Test pass@1")["trrd"]["seeds"] == "3"
    )


def loaded(runs: list[ReportedRun]) -> list[Run]:
    read = [read_run(run) for run in runs]
    assert all(isinstance(run, Run) for run in read), read
    return [run for run in read if isinstance(run, Run)]


# --- runs that lack something ---------------------------------------------------------------------


def test_runs_without_optional_metrics_samples_and_tests(tmp_path):
    sft = write_run(tmp_path / "sft", correct=[1, 0, 1], num_samples=1, objective="sft", metrics=())
    (sft / "samples.jsonl").unlink()
    page, text, rows = report([ReportedRun("sft", sft)], tmp_path / "out")
    assert rows[0]["ood_after"] is None and rows[0]["peak_memory_bytes"] is None
    assert "Reward" not in page and "pass@2" not in page and "out of distribution" not in text
    assert table(text, "Cost")["sft"]["peak memory, MiB"] == "–"
    assert (
        "minus" not in text.split("**Test after")[0] and "reaches 66.7% [0.0, 100.0], with" in text
    )


def test_a_curve_says_who_has_not_recorded_it(tmp_path):
    a = write_run(tmp_path / "a", correct=[1, 2])
    b = write_run(tmp_path / "b", correct=[1, 2], objective="sft", metrics=())
    page, _, _ = report([ReportedRun("trrd", a), ReportedRun("sft", b)], tmp_path / "out")
    assert "Reward by step. Not recorded by sft." in page


def test_a_run_without_steps(tmp_path):
    folder = write_run(tmp_path / "a", correct=[1, 2])
    (folder / "metrics.jsonl").write_text("")
    _, text, _ = report([ReportedRun("trrd", folder)], tmp_path / "out")
    assert table(text, "Cost")["trrd"]["s / step"] == "–"


# --- hostile text ---------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script>"


def test_text_of_models_and_people_stays_text(tmp_path):
    row = sample_row(
        1, [EVIL, "\u202etxt", "\x1b[31m", '" onmouseover="x', "a\nb"], "+h+++", verdict=EVIL
    )
    row["prompt"] = EVIL
    run = write_run(tmp_path / "x", correct=[1, 2], samples=[row], teacher={"model": f"a|b`{EVIL}"})
    method = f"{EVIL} $\\frac{{1}}$ |"
    missing = [MissingRun(EVIL, 0, f"line one\n| {EVIL} | [x](http://evil)\n# heading")]
    page, text, _ = report(
        [ReportedRun(method, run)], tmp_path / "out", missing=missing, title=EVIL, notes=[EVIL]
    )
    scripts = re.findall(r"<script[^>]*>(.)", page)
    assert (
        scripts == ["/"]
        and "\u202e" not in page
        and "\x1b" not in page
        and 'onmouseover="x' not in page.replace("&#34;", "")
    )
    assert "&lt;script&gt;" in page and "<script" not in text
    assert "[x](http" not in text and len(table(text, "Runs that are not in the tables")) == 1
    # Missing; results; detail (two pass@k, two difficulties, tokens, truncated); fates; cost;
    # cost to the target; methods: each with the row's name.
    assert cells(text) == [{3}, {6}, {7}, {8}, {11}, {5}, {4}]


def test_episodes_have_turns_and_what_the_environment_wrote_is_grey(tmp_path):
    words = ["go", " on", "\n", "wall", " left"]
    samples = [sample_row(1, words, "++ee+")]
    episodes = write_run(tmp_path / "a", correct=[1, 2, 4], num_turns=2.5, samples=samples)
    single = write_run(tmp_path / "b", correct=[1, 2, 4], objective="grpo")
    page, text, _ = report([ReportedRun("trrd", episodes)], tmp_path / "one")
    detail = table(text, "Test after training")
    assert detail["trrd"]["turns"] == "3.5"  # of 2.5, 3.5, 4.5
    (grey,) = re.findall(r'<span class="environment" title="written by[^>]*>(wall)<', page)
    assert grey and page.count(ENVIRONMENT.meaning + '">') == 2
    # Of 5 tokens the student wrote 3; each of them was reinforced.
    assert ">3 reinforced<" in page
    _, text, _ = report([ReportedRun("grpo", single)], tmp_path / "two")
    assert "turns" not in table(text, "Test after training")["grpo"]


def test_markdown_by_hand():
    assert (
        markdown("a|b *c* _d_ e_f `g` <b> 3 < 4\n# x [y](z)")
        == r"a\|b \*c\* \_d\_ e_f \`g\` &lt;b> 3 < 4 # x [y]\(z)"
    )
    assert markdown("- item") == r"\- item"


def test_addresses_are_no_links_by_hand():
    """GitHub makes a link of https://, www. and a mail address in plain text; a comment, which
    shows nothing, parts them."""
    assert markdown("see http://a.b/c") == "see http:<!-- -->//a.b/c"
    assert markdown("HTTPS://a.b, ftp://a.b") == "HTTPS:<!-- -->//a.b, ftp:<!-- -->//a.b"
    assert markdown("www.a.b and WWW.A.B") == "www<!-- -->.a.b and WWW<!-- -->.A.B"
    assert markdown("me@a_b.org, mailto:me@a.org") == "me@<!-- -->a_b.org, mailto:me@<!-- -->a.org"
    assert markdown("pass@1: 0.5 at step 3, a/b//c, wwww") == "pass@1: 0.5 at step 3, a/b//c, wwww"


def test_the_page_needs_nothing_from_outside(runs, tmp_path):
    page, _, _ = report(runs, tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1].startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    addresses = set(re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page))
    assert addresses and all(a.startswith("data:image/svg+xml;base64,") for a in addresses)
    for image in re.findall(r"<img[^>]*>", page):
        assert re.search(r'alt="[^"]{15,}"', image), image


# --- the imitation map ----------------------------------------------------------------------------


def test_the_map_shows_the_completions_with_most_gated_tokens(tmp_path):
    words = [f" w{i}" for i in range(20)]
    samples = [
        sample_row(1, words, "h" * 2 + "+" * 18),
        sample_row(1, words, "h" * 5 + "+" * 15, clamped="c" * 3 + "." * 17),
        sample_row(1, words, "p" * 4 + "-" * 16, advantage=-0.7),
        sample_row(4, words[:2], "h+"),  # 1 of 2 tokens, but 2 tokens say little
        sample_row(4, words, "h" * 3 + "+" * 17),
    ]
    run = write_run(tmp_path / "a", correct=[1, 2], samples=samples)
    other = write_run(tmp_path / "b", correct=[1, 2], objective="grpo", samples=samples)
    groups, _ = group_runs(loaded([ReportedRun("trrd", run), ReportedRun("grpo", other)]))
    (found,) = imitation_maps(groups[0].methods)
    shown = [
        (
            c.phase,
            c.row.step,
            c.rollout.verdict,
            [(f.letter, n) for f, n in c.counts],
            c.num_clamped,
        )
        for c in found.completions
    ]
    assert shown == [
        ("early", 1, "correct", [("+", 15), ("h", 5)], 3),
        ("early", 1, "wrong", [("-", 16), ("p", 4)], 0),
        ("late", 4, "correct", [("+", 17), ("h", 3)], 0),
    ]
    early, late = found.phases
    assert (early.num_tokens, early.share("h"), early.share("c")) == (60, 7 / 60, 3 / 60)
    assert (late.num_tokens, late.share("h")) == (22, 4 / 22)
    assert (
        found.completions[0].tokens[0].note
        == "held back; log student - log teacher +0.50, clamped; advantage +1.00"
    )


def test_long_completions_are_cut_and_say_so(tmp_path):
    samples = [sample_row(1, ["x"] * 1000, "h" * 1000)]
    run = write_run(tmp_path / "a", correct=[1, 2], samples=samples)
    page, _, _ = report([ReportedRun("trrd", run)], tmp_path / "out")
    assert f"the first {MOST_TOKENS} of 1000 tokens" in page and "1000 held back" in page


def test_damaged_samples_are_passed_over(tmp_path):
    """Broken JSON, no rollouts, an unknown fate, unequal lengths, no number: the good row between
    them is shown."""
    good = sample_row(1, [" a", " b"], "h+")
    rows = [
        {"step": 1, "prompt": "?"},
        sample_row(1, [" a"], "x"),
        sample_row(1, [" a", " b"], "h"),
        good,
    ]
    rows += [
        sample_row(0, [" a"], "h"),
        sample_row(1, [" a"], "h", advantage=math.nan),
        sample_row(1, ["a"], "h", verdict=None),
    ]
    folder = write_run(tmp_path / "a", correct=[1, 2], samples=rows)
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "prom\n\xff\n[]\n' + json.dumps(good).encode() + b"\n")
    page, _, _ = report([ReportedRun("trrd", folder)], tmp_path / "out")
    groups, _ = group_runs(loaded([ReportedRun("trrd", folder)]))
    (found,) = imitation_maps(groups[0].methods)
    assert found.phases[0].num_tokens == 4 and page.count('class="completion"') == 1


# --- the baseline ---------------------------------------------------------------------------------


def methods_of(tmp_path: Path, **objectives: str | dict[str, Any]) -> Any:
    runs = [
        ReportedRun(m, write_run(tmp_path / m, correct=[1, 2], objective=o))
        for m, o in objectives.items()
    ]
    return group_runs(loaded(runs))[0][0].methods


def test_the_baseline_is_the_one_given_else_grpo_by_name_else_by_objective_else_the_first(tmp_path):
    dapo = {"type": "grpo", "clip_low": 0.2, "clip_high": 0.28}
    methods = methods_of(tmp_path / "a", trrd="trrd", dapo=dapo, grpo="grpo")
    assert baseline_of(methods).name == "grpo" and baseline_of(methods, "trrd").name == "trrd"
    compared = with_comparisons(methods, baseline_of(methods, "dapo"))
    assert [m.name for m in compared if m.to_baseline is None] == ["dapo"]
    assert baseline_of(methods_of(tmp_path / "b", trrd="trrd", dapo=dapo)).name == "dapo"
    assert baseline_of(methods_of(tmp_path / "c", trrd="trrd", kdrl="kdrl")).name == "trrd"


def test_a_baseline_that_is_no_method(runs, tmp_path):
    with pytest.raises(
        ValueError, match=r"^the baseline 'gspo' is not one of the methods grpo, trrd\.$"
    ):
        write_report(runs, tmp_path, baseline="gspo")
    assert not list(tmp_path.iterdir())


def test_the_report_is_about_the_baseline_given(runs, tmp_path):
    _, text, _ = report(runs, tmp_path, baseline="trrd")
    assert table(text, "Test pass@1")["grpo"]["minus trrd"].startswith("\N{MINUS SIGN}47.2 [")
    assert "trrd is ahead of grpo." in text.splitlines()[2]


def test_a_baseline_whose_runs_are_missing_ends_no_report(runs, tmp_path):
    page, text, _ = report(
        [*runs, ReportedRun("kdrl", tmp_path / "gone")], tmp_path / "out", baseline="kdrl"
    )
    told = "This table has no run of kdrl, the chosen baseline; its methods are compared with grpo."
    assert told in page and told in text and "minus grpo" in table(text, "Test pass@1")["trrd"]


# --- what some methods do otherwise ---------------------------------------------------------------


def test_sft_samples_nothing_and_the_teacher_of_gkd_works_in_the_update(tmp_path):
    names = ("trrd", "sft", "gkd")
    runs = [ReportedRun(m, write_run(tmp_path / m, correct=[1, 2], objective=m)) for m in names]
    page, text, rows = report(runs, tmp_path / "out")
    assert {name: row["sampled tokens"] for name, row in table(text, "Cost").items()} == {
        "trrd": "320",
        "sft": "–",
        "gkd": "320",
    }
    assert [row["completion_tokens"] for row in rows] == [320, None, 320]
    assert "Completion length by step. Not recorded by sft." in page and "Reward by step.<" in page
    for form in (page, text):
        assert (
            "gkd: the teacher runs inside the update" in form
            and "sft: the student samples nothing" in form
        )


def test_the_entropy_curve_says_what_it_is_over(runs, tmp_path):
    page, _, _ = report(runs, tmp_path)
    told = "Entropy by step. Over the trained tokens, so not comparable between methods that train"
    assert page.count(told) == 2  # caption and alternative text


# --- the command ----------------------------------------------------------------------------------


def test_command_finds_runs_below_a_folder(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "cmp" / "runs" / "my trrd" / f"seed-{seed}", correct=[1, 2], seed=seed)
    write_run(tmp_path / "cmp" / "tuning" / "trrd" / "lr-1" / "seed-0", correct=[1, 2])
    alone = write_run(tmp_path / "alone", correct=[1, 2], objective="grpo")
    page = report_runs(
        [str(tmp_path / "cmp"), str(alone), str(tmp_path / "cmp" / "runs")], str(tmp_path / "out")
    )
    results = table(page.with_name("report.md").read_text(), "Test pass@1")
    assert {name: row["seeds"] for name, row in results.items()} == {"my trrd": "2", "grpo": "1"}


def write_comparison(root: Path) -> None:
    """Two seeds of `TRRD, α = .5` in the folder `TRRD_.5`, and of `a baseline` in `base`."""
    for seed in (0, 1):
        write_run(root / "runs" / "TRRD_.5" / f"seed-{seed}", correct=[3, 4], seed=seed)
        write_run(
            root / "runs" / "base" / f"seed-{seed}", correct=[1, 2], seed=seed, objective="kdrl"
        )
    methods = {"TRRD_.5": "TRRD, α = .5", "gone": "gone", "base": "a baseline"}
    notes = ["α = .5: 1e-05 of two"]
    described = ComparisonFile(methods=methods, notes=notes, baseline="a baseline")
    write_files(root, {"comparison.json": described.model_dump_json()})


@pytest.mark.parametrize("given", ["", "runs", "runs/TRRD_.5"])
def test_command_takes_names_notes_and_baseline_from_a_comparison(tmp_path, given):
    write_comparison(tmp_path / "cmp")
    alone = write_run(tmp_path / "alone", correct=[1, 2], objective="grpo")
    page = report_runs(
        [str(tmp_path / "cmp" / given), str(alone)], str(tmp_path / "out")
    ).read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    results = table(text, "Test pass@1")
    both = given != "runs/TRRD_.5"
    assert list(results) == ["TRRD, α = .5", *(["a baseline"] if both else []), "grpo"]
    assert f"minus {'a baseline' if both else 'grpo'}" in results["TRRD, α = .5"]
    assert (
        "α = .5: 1e-05 of two" in page and "and selected the learning rates (see the notes)" in page
    )


def test_a_baseline_that_is_given_is_stronger_than_that_of_the_comparison(tmp_path):
    write_comparison(tmp_path / "cmp")
    report_runs([str(tmp_path / "cmp")], str(tmp_path / "out"), baseline="TRRD, α = .5")
    assert "minus TRRD, α = .5" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(
        ValueError,
        match=r"the baseline 'x' is not one of the methods TRRD, α = \.5, a baseline",
    ):
        report_runs([str(tmp_path / "cmp")], str(tmp_path / "out"), baseline="x")


def test_runs_that_a_comparison_does_not_know_keep_their_folders_name(tmp_path):
    write_comparison(tmp_path / "cmp")
    write_run(tmp_path / "cmp" / "runs" / "Another" / "seed-0", correct=[1, 2], objective="opd")
    report_runs([str(tmp_path / "cmp")], str(tmp_path / "out"))
    results = table((tmp_path / "out" / "report.md").read_text(), "Test pass@1")
    assert list(results) == ["TRRD, α = .5", "a baseline", "Another"]


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    write_files(tmp_path, {"comparison.json": ComparisonFile(methods={}).model_dump_json()})
    write_text = Path.write_text

    def break_off(path: Path, text: str, **options: Any) -> None:
        write_text(path, text[:5], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", break_off)
    with pytest.raises(ValueError, match="No space left on device"):
        write_files(tmp_path, {"comparison.json": "{} and more"})
    assert read_comparison_file(tmp_path) is not None


def test_a_comparison_file_that_cannot_be_read(tmp_path):
    assert read_comparison_file(tmp_path) is None
    for damaged in ("{", "[]", '{"methods": {"a": 1}}'):
        (tmp_path / "comparison.json").write_text(damaged)
        with pytest.raises(
            ValueError,
            match=r"comparison\.json is not a file that a comparison has written; let `rlad comp",
        ):
            read_comparison_file(tmp_path)


@pytest.mark.parametrize(
    ("paths", "output", "sentence"),
    [
        (["nowhere"], "out", "no run found in .*nowhere; give run directories"),
        (["empty"], "out", "no run found in .*empty; give"),
        (["run"], "file", "--output .*file is a file; give a folder"),
        (["run"], "file/below", "the report cannot be written to .*; choose another folder"),
        ([], "out", "no run found in"),
    ],
)
def test_mistakes(tmp_path, paths, output, sentence):
    write_run(tmp_path / "run", correct=[1, 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=sentence):
        report_runs([str(tmp_path / path) for path in paths], str(tmp_path / output))


def test_methods_come_in_the_order_given_and_bars_hold_their_mean(runs):
    groups, doubles = group_runs(loaded([*runs[3:], *runs[:3]]))
    figures = groups[0].methods
    assert [f.name for f in figures] == ["trrd", "grpo"] and doubles == []
    for f in figures:
        assert 0 <= f.after.low <= f.after.mean <= f.after.high <= 1 and not math.isnan(f.sd)
        assert all(small.mean <= large.mean for small, large in pairwise(f.pass_at_k.values()))
