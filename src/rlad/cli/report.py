"""`rlad report`: a report from run directories, or from folders that hold some."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlad.comparison.report import HTML, ComparisonFile, read_comparison_file, write_report
from rlad.comparison.runs import ReportedRun
from rlad.config.file import load_config
from rlad.errors import UserError
from rlad.runs.directory import CONFIG, RunDirectory

Comparisons = dict[Path, ComparisonFile]
"""ROOT/runs -> the comparison of the runs at ROOT/runs/METHOD/seed-N"""


def report_runs(paths: Sequence[str], output: str, baseline: str | None = None) -> Path:
    """Write the report of all runs in and below `paths`; returns the HTML file.

    Runs of a comparison get the names that it gave them, and come with its notes and, unless one is
    given, its baseline.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"--output {folder} is a file; give a folder for {HTML} and what belongs to it."
        )
    found: dict[Path, ReportedRun] = {}
    comparisons: Comparisons = {}
    for path in map(Path, paths):
        runs = list(_runs_in(path))
        if not runs:
            raise UserError(
                f"no run found in {path}; give a run directory, or a folder that holds some."
            )
        comparisons |= _comparisons_of(runs)
        # A run that is below several of the given paths is shown once.
        for run in sorted(runs, key=lambda run: _place(run, comparisons)):
            found.setdefault(run.resolve(), ReportedRun(_method_of(run, comparisons), run))
    if not found:
        raise UserError("no run was given; give run directories, or folders that hold some.")
    # A comparison's baseline may be none of the runs that were given here.
    names = {run.method for run in found.values()}
    baselines = [c.baseline for c in comparisons.values() if c.baseline in names]
    write_report(
        list(found.values()),
        folder,
        title=f"Report on {', '.join(Path(path).resolve().name for path in paths)}",
        notes=[note for comparison in comparisons.values() for note in comparison.notes],
        baseline=baseline or next(iter(baselines), None),
    )
    return folder / HTML


def _runs_in(path: Path) -> Iterator[Path]:
    """Find the runs in and below a path in the order of their names; those that tuned a comparison
    are left out."""
    for folder, subfolders, _ in os.walk(path):
        subfolders.sort()
        # Runs that chose a learning rate would be counted as further seeds of their method.
        if "tuning" in subfolders and "runs" in subfolders:
            subfolders.remove("tuning")
        if RunDirectory(Path(folder)).exists():
            subfolders.clear()
            yield Path(folder)


def _comparisons_of(runs: Sequence[Path]) -> Comparisons:
    folders = dict.fromkeys(run.resolve().parent.parent for run in runs)
    read = {
        folder: read_comparison_file(folder.parent) for folder in folders if folder.name == "runs"
    }
    return {folder: comparison for folder, comparison in read.items() if comparison}


def _place(run: Path, comparisons: Comparisons) -> int:
    """Find the place of a run's method in its comparison; other runs keep their order after
    those."""
    method = run.resolve().parent
    comparison = comparisons.get(method.parent)
    names = list(comparison.methods) if comparison else []
    if method.name in names:
        return names.index(method.name)
    return sum(len(each.methods) for each in comparisons.values())


def _method_of(run: Path, comparisons: Comparisons) -> str:
    """Name the method of a run as its comparison does; else, where runs lie as METHOD/seed-N, by
    that folder; else by the type of the objective."""
    resolved = run.resolve()
    folder = resolved.parent
    comparison = comparisons.get(folder.parent)
    if resolved.name.startswith("seed-"):
        return comparison.methods.get(folder.name, folder.name) if comparison else folder.name
    try:
        return load_config(run).objective.type
    except UserError:
        return f"{resolved.name} ({CONFIG} cannot be read)"
