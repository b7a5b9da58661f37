"""How far real runs stay from the guards' limits: `python benchmarks/guard_margins.py
runs/methods/runs runs/alpha/runs`.

The arguments are run directories, or folders that hold some, as `rlad compare` makes them. For
every guard: its limit, the figure that came nearest to it (or went beyond), at which step of which
run, and in how many runs it spoke. Writes nothing.
"""

import argparse
from pathlib import Path

from rlad.config.file import load_config
from rlad.runs.directory import CONFIG, METRICS, RunDirectory
from rlad.runs.guards import GUARDS, Guard, numbers_of, value_of

Place = tuple[float, str]


def worst_of(guard: Guard, run: RunDirectory) -> Place | None:
    """The figure nearest to (or farthest beyond) the limit, and where it was."""
    values: list[float] = []
    places: list[Place] = []
    for row in map(numbers_of, run.read(METRICS)):
        if (value := value_of(guard.condition.metric, row)) is not None:
            values.append(value)
            figure = guard.condition.figure(values)
            places += (
                []
                if figure is None
                else [(figure, f"step {row['step']:.0f} of {'/'.join(run.path.parts[-3:])}")]
            )
    return pick(guard, places)


def pick(guard: Guard, places: list[Place]) -> Place | None:
    return (max if guard.condition.side == "above" else min)(places, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    folders = parser.parse_args().folders
    runs = sorted(
        {RunDirectory(path.parent) for folder in folders for path in folder.rglob(CONFIG)},
        key=lambda run: run.path,
    )
    runs = [run for run in runs if run.exists()]
    print(
        f"{len(runs)} runs\n\n| guard | limit | nearest figure | where | runs in which it spoke "
        f"|\n|{' --- |' * 5}"
    )
    for guard in GUARDS:
        condition = guard.condition
        found = [
            worst
            for run in runs
            if guard.concerns(load_config(run.path)) and (worst := worst_of(guard, run))
        ]
        result = "not recorded | | |"
        if nearest := pick(guard, found):
            spoke = sum(
                figure > condition.limit if condition.side == "above" else figure < condition.limit
                for figure, _ in found
            )
            result = f"{nearest[0]:.3g} | {nearest[1]} | {spoke} of {len(found)} |"
        print(f"| {guard.name} | {condition.side} {condition.limit:g} | {result}")


if __name__ == "__main__":
    main()
