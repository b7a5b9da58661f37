"""`rlad report`: a report on run directories, or on folders that contain some."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlad.comparison.finished_runs import ReportedRun
from rlad.comparison.report import HTML, ComparisonFile, read_comparison_file, write_report
from rlad.config.file import load_config
from rlad.errors import UserError
from rlad.runs.directory import CONFIG, RunDirectory


def report_runs(
    paths: Sequence[str],
    output: str,
    baseline: str | None = None,
    figures: Path | None = None,
) -> Path:
    """Write the report on all runs in and below `paths`, and return the HTML file.

    Runs of a comparison keep its method names, its notes and, if `baseline` is None, its baseline.
    """
    folder = Path(output)
    runs_of = {path: list(_runs_in(Path(path))) for path in paths}
    empty = [path for path, runs in runs_of.items() if not runs]
    problem = ""
    if folder.exists() and not folder.is_dir():
        problem = f"--output {folder} is a file; give a folder for {HTML} and its other files."
    elif empty or not paths:
        problem = (
            f"no run found in {', '.join(empty)}; give run directories, or folders that contain "
            "some."
        )
    if problem:
        raise UserError(problem)
    found: dict[Path, ReportedRun] = {}
    comparisons: dict[Path, ComparisonFile | None] = {}
    for runs in runs_of.values():
        reported = []
        for run in runs:
            # The runs of a comparison are at ROOT/runs/METHOD/seed-N.
            place = run.resolve().parent.parent
            if place.name == "runs" and place not in comparisons:
                comparisons[place] = read_comparison_file(place.parent)
            reported.append((*_place_and_method(run, comparisons.get(place)), run))
        # A run that is below several of the given paths is shown once.
        for _, method, run in sorted(reported, key=lambda row: row[0]):
            found.setdefault(run.resolve(), ReportedRun(method, run))
    named = [comparison for comparison in comparisons.values() if comparison]
    # A comparison's baseline may not be among the given runs.
    methods = {run.method for run in found.values()}
    baselines = [each.baseline for each in named if each.baseline in methods]
    write_report(
        list(found.values()),
        folder,
        title=f"Report on {', '.join(Path(path).resolve().name for path in paths)}",
        notes=[note for comparison in named for note in comparison.notes],
        baseline=baseline or next(iter(baselines), None),
        figures=figures,
    )
    return folder / HTML


def _runs_in(path: Path) -> Iterator[Path]:
    """Find the runs in and below a path, in the order of their names, without the tuning runs of
    comparisons."""
    for folder, subfolders, _ in os.walk(path):
        subfolders.sort()
        # Tuning runs would be counted as further seeds of their method.
        if "tuning" in subfolders and "runs" in subfolders:
            subfolders.remove("tuning")
        if RunDirectory(Path(folder)).exists():
            subfolders.clear()
            yield Path(folder)


def _place_and_method(run: Path, comparison: ComparisonFile | None) -> tuple[float, str]:
    """Return the place of a run's method in its comparison (infinity if it has none), and its name:
    that in the comparison, or the folder of a run at METHOD/seed-N, or the objective's type."""
    resolved = run.resolve()
    folder = resolved.parent.name
    methods = comparison.methods if comparison else {}
    place = list(methods).index(folder) if folder in methods else math.inf
    if resolved.name.startswith("seed-"):
        return place, methods.get(folder, folder)
    try:
        return place, load_config(run).objective.type
    except UserError:
        return place, f"{resolved.name} ({CONFIG} cannot be read)"
