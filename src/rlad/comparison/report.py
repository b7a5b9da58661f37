"""The report of some runs: tables with intervals, plots, the imitation map. Reads run directories,
trains nothing."""

import json
from collections.abc import Sequence
from pathlib import Path

from rlad.comparison.comparable import group_runs
from rlad.comparison.methods import require_baseline
from rlad.comparison.page import make_page, render_html, render_markdown
from rlad.comparison.runs import MissingRun, ReportedRun, Run, read_run
from rlad.errors import UserError

HTML = "report.html"
MARKDOWN = "report.md"
RESULTS = "results.jsonl"


def write_report(
    runs: Sequence[ReportedRun],
    output: Path,
    *,
    missing: Sequence[MissingRun] = (),
    title: str = "Report",
    notes: Sequence[str] = (),
    baseline: str | None = None,
) -> Sequence[MissingRun]:
    """Write `report.html`, `report.md` and `results.jsonl` (a row for each run) into the folder
    `output`; returns the runs that the report lists as missing.

    Runs that cannot be compared are in separate tables. A run that is unfinished or unreadable is
    listed with the reason, as are those of `missing`. `notes` say how a search on the validation
    split chose the learning rates. `UserError` when no run is of the method `baseline` (see
    `baseline_of`), or when the folder cannot be written.
    """
    read = [read_run(run) for run in runs]
    groups, doubles = group_runs([run for run in read if isinstance(run, Run)])
    missing = [*missing, *(run for run in read if isinstance(run, MissingRun)), *doubles]
    if baseline is not None:
        require_baseline(baseline, groups, missing)
    page = make_page(title, notes, groups, missing, baseline)
    rows = [
        run.to_json() | {"method": method.name, "table": number}
        for number, group in enumerate(groups, start=1)
        for method in group.methods
        for run in method.runs
    ]
    files = {
        HTML: render_html(page),
        MARKDOWN: render_markdown(page),
        RESULTS: "".join(json.dumps(row) + "\n" for row in rows),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (output / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {output} ({error.strerror}); choose another folder."
        ) from None
    return missing
