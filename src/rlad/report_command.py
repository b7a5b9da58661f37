"""`rlad report`: a report from run directories, or from folders that hold some."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlad.config_file import load_config
from rlad.report import HTML, ReportedRun, write_report
from rlad.run_dir import CONFIG, RunDirectory

DEFAULT_OUTPUT = "report"
_SEED_FOLDER = "seed-"


def report_runs(paths: Sequence[str], output: str | None) -> Path:
    """Write the report of all runs in and below `paths`; returns the HTML file. `ValueError` for a user's mistake."""
    folder = Path(output or DEFAULT_OUTPUT)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; give a folder for {HTML} and what belongs to it.")
    found: dict[Path, ReportedRun] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; give a run directory, or a folder that holds run directories.")
        runs = list(_runs_in(path))
        if not runs:
            raise ValueError(f"no run found in {path}; give a run directory, or a folder that holds run directories.")
        found |= {run.resolve(): ReportedRun(_method_of(run), run) for run in runs if run.resolve() not in found}
    if not found:
        raise ValueError("no run was given; give run directories, or folders that hold some.")
    write_report(list(found.values()), folder, title=f"Report on {', '.join(Path(path).resolve().name for path in paths)}")
    return folder / HTML


def _runs_in(path: Path) -> Iterator[Path]:
    """The path itself, or the runs below it in the order of their names; those that tuned a comparison are left out."""
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


def _method_of(run: Path) -> str:
    """Where runs lie as METHOD/seed-N that name; else the type of the objective, as far as it can be read."""
    resolved = run.resolve()
    if resolved.name.startswith(_SEED_FOLDER):
        return resolved.parent.name
    try:
        return load_config(run).objective.type
    except ValueError:
        return f"{resolved.name} ({CONFIG} cannot be read)"
