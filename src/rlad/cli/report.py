"""`rlad report`: a report from run directories, or from folders that hold some."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlad.comparison.comparison_file import ComparisonFile, read_comparison_file
from rlad.comparison.report import HTML, write_report
from rlad.comparison.runs import ReportedRun
from rlad.config.file import load_config
from rlad.errors import UserError
from rlad.runs.directory import CONFIG, RunDirectory

DEFAULT_OUTPUT = "report"
_SEED_FOLDER = "seed-"


def report_runs(paths: Sequence[str], output: str | None, baseline: str | None = None) -> Path:
    """Write the report of all runs in and below `paths`; returns the HTML file. `UserError` for a
    user's mistake.

    Runs of a comparison bear the names that it gave them, and come with its notes and, unless one
    is given, its baseline.
    """
    folder = Path(output or DEFAULT_OUTPUT)
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"--output {folder} is a file; give a folder for {HTML} and what belongs to it."
        )
    found: dict[Path, ReportedRun] = {}
    comparisons: dict[Path, ComparisonFile] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(
                f"{path} is no folder; give a run directory, or a folder that holds run "
                "directories."
            )
        runs = list(_runs_in(path))
        if not runs:
            raise UserError(
                f"no run found in {path}; give a run directory, or a folder that holds run "
                "directories."
            )
        comparisons |= _comparisons_of(runs)
        runs.sort(key=lambda run: _place(run, comparisons))
        found |= {
            run.resolve(): ReportedRun(_method_of(run, comparisons), run)
            for run in runs
            if run.resolve() not in found
        }
    if not found:
        raise UserError("no run was given; give run directories, or folders that hold some.")
    names = {run.method for run in found.values()}
    baselines = [
        baseline,
        *(
            comparison.baseline
            for comparison in comparisons.values()
            if comparison.baseline in names
        ),
    ]
    write_report(
        list(found.values()),
        folder,
        title=f"Report on {', '.join(Path(path).resolve().name for path in paths)}",
        notes=[note for comparison in comparisons.values() for note in comparison.notes],
        baseline=next((name for name in baselines if name), None),
    )
    return folder / HTML


def _runs_in(path: Path) -> Iterator[Path]:
    """The path itself, or the runs below it in the order of their names; those that tuned a
    comparison are left out."""
    if RunDirectory(path).exists():
        yield path
        return
    for folder, subfolders, _ in os.walk(path):
        subfolders.sort()
        if "tuning" in subfolders and "runs" in subfolders:
            subfolders.remove("tuning")
        if RunDirectory(Path(folder)).exists():
            subfolders.clear()
            yield Path(folder)


def _comparisons_of(runs: Sequence[Path]) -> dict[Path, ComparisonFile]:
    """The comparisons that runs at ROOT/runs/METHOD/seed-N belong to, by ROOT/runs."""
    folders = dict.fromkeys(run.resolve().parent.parent for run in runs)
    read = {
        folder: read_comparison_file(folder.parent) for folder in folders if folder.name == "runs"
    }
    return {folder: comparison for folder, comparison in read.items() if comparison}


def _place(run: Path, comparisons: dict[Path, ComparisonFile]) -> int:
    """Where the method of a run stands in its comparison; other runs keep their order behind
    those."""
    method = run.resolve().parent
    comparison = comparisons.get(method.parent)
    names = list(comparison.methods) if comparison else []
    return (
        names.index(method.name)
        if method.name in names
        else sum(len(each.methods) for each in comparisons.values())
    )


def _method_of(run: Path, comparisons: dict[Path, ComparisonFile]) -> str:
    """What the comparison calls it; where runs lie as METHOD/seed-N that name; else the type of the
    objective."""
    resolved = run.resolve()
    if resolved.name.startswith(_SEED_FOLDER):
        folder = resolved.parent
        comparison = comparisons.get(folder.parent)
        return comparison.methods.get(folder.name, folder.name) if comparison else folder.name
    try:
        return load_config(run).objective.type
    except UserError:
        return f"{resolved.name} ({CONFIG} cannot be read)"
