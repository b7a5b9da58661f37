"""What `rlad compare` is to do: its TOML file. Imports no torch."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rlad.config.file import DEFAULT_RUN, parse_config, parse_overrides, read_toml
from rlad.config.presets import expand_preset, merged
from rlad.config.run import OptimizationConfig, RunConfig
from rlad.config.types import Count, Mark, NonNegativeInt, Section
from rlad.config.validation import validated
from rlad.errors import UserError

DEFAULT_COMPARISON = Path(__file__).parents[1] / "embedded" / "compare.toml"

_SHARED_OPTIMIZATION = OptimizationConfig.keys_with(Mark.LENGTH, Mark.BUDGET, Mark.NO_NUMBER)

LearningRate = Annotated[float, Field(strict=True, gt=0, le=1)]


class TuningConfig(Section):
    """The same search for every method: the learning rate with the highest validation pass@1 after
    the last step."""

    learning_rates: tuple[LearningRate, ...] = Field(min_length=1)
    """tried for each method"""
    seeds: tuple[NonNegativeInt, ...] = Field((1000,), min_length=1)
    """of the tuning runs; preferably none of the seeds that are reported"""


class CompareConfig(Section):
    """Several methods and seeds under one budget."""

    run: str | None = None
    """TOML of the run that all methods share but for its objective, beside this file; absent: the
    embedded default"""
    directory: str = "runs/comparison"
    """where runs and report are stored"""
    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2), min_length=1)
    """each method is trained once with each"""
    jobs: Count = 1
    """runs side by side, each with its share of the cores"""
    shared: dict[str, Any] = Field(default_factory=dict)
    """settings of all runs that differ from those of `run`"""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """name -> its settings; a name that is an objective or a preset needs none"""
    baseline: str | None = None
    """the method that the others are compared with; by default `grpo`, or else the first"""
    tuning: TuningConfig | None = None
    """choose each method's learning rate first, on the validation split"""

    @model_validator(mode="after")
    def _fits_together(self) -> "CompareConfig":
        if problem := next(self._problems(), None):
            raise UserError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        values: dict[str, list[Any]] = {"seeds": list(self.seeds)}
        if self.tuning:
            values["tuning.seeds"] = list(self.tuning.seeds)
            values["tuning.learning_rates"] = list(self.tuning.learning_rates)
        for name, each in values.items():
            if len(set(each)) < len(each):
                yield f"{name} = {each} holds a value twice; each run needs one of its own"
        if "seed" in self.shared or "run_dir" in self.shared:
            yield (
                "[shared] sets seed or run_dir, which belong to single runs; use seeds and "
                "directory"
            )
        if self.baseline is not None and self.baseline not in self.methods:
            there_are = ", ".join(self.methods)
            yield f"baseline = {self.baseline!r} is none of the methods; there are {there_are}"


def load_comparison(
    path: Path | str | None = None, overrides: list[str] | None = None
) -> tuple[CompareConfig, Path]:
    """The comparison in a TOML file (None: the embedded default) with overrides, and the folder
    that its paths start from.

    Raises `UserError` with one sentence for each mistake, those of its methods included.
    """
    path = DEFAULT_COMPARISON if path is None else Path(path)
    config = validated(CompareConfig, parse_overrides(read_toml(path), overrides or []))
    folders: dict[str, str] = {}
    for name in config.methods:
        # Names that differ only in characters that no folder may have would overwrite each other's
        # runs.
        folder = folder_name(name)
        if folder in folders or not folder.strip("."):
            raise UserError(
                f"methods {name!r} and {folders.get(folder)!r} would share one folder; rename one "
                "of them."
            )
        folders[folder] = name
        method_config(config, path.parent, name, seed=config.seeds[0])
    return config, path.parent


def folder_name(method: str) -> str:
    """The method's name as a folder."""
    return re.sub(r"[^\w.=+-]+", "_", method)


def method_config(comparison: CompareConfig, folder: Path, method: str, *, seed: int) -> RunConfig:
    """The run of one method with one seed. `UserError` when it is no valid run, or changes the
    budget of all."""
    changes = comparison.methods[method]
    if wrong := _shared_settings(changes):
        raise UserError(
            f"method {method!r} sets {', '.join(wrong)}, but all methods share one budget; a "
            "method may set objective, teacher and how it optimises: put the rest into [shared]."
        )
    base = read_toml(Path(os.path.join(folder, comparison.run)) if comparison.run else DEFAULT_RUN)
    objective = base.pop("objective", {})
    if "objective" not in changes:
        # The base run's own settings of its objective are those of the method of that name.
        is_of_base = objective.get("type") == method
        changes = {"objective": objective if is_of_base else {"type": method}} | changes
    # A later layer wins: the base run, what all share, a preset, the method, the seed.
    table = expand_preset(changes, merged(base, comparison.shared)) | {"seed": seed}
    try:
        config = parse_config(table)
        _require_fair_limit(config)
    except UserError as error:
        lines = [f"method {method!r}: {line}" for line in str(error).splitlines()]
        raise UserError("\n".join(lines)) from None
    return config


def _shared_settings(changes: dict[str, Any]) -> list[str]:
    """Those settings of a method that all methods must share."""
    found = []
    for section, value in changes.items():
        if section in ("objective", "teacher"):
            continue
        if not isinstance(value, dict):
            found.append(section)
            continue
        # Of [optimization] a method may choose how it learns, not how long; other sections belong
        # to all.
        shared = _SHARED_OPTIMIZATION if section == "optimization" else value
        found += [f"{section}.{key}" for key in value if key in shared]
    return found


def _require_fair_limit(config: RunConfig) -> None:
    """`UserError` when a limit of seconds or teacher tokens means nothing to a method, or ends a
    schedule before its end."""
    loop = config.optimization
    problem = ""
    # A schedule planned for 1,000 steps and ended at 600 seconds is another schedule for each
    # method.
    limits = [
        name for name in ("max_seconds", "max_teacher_tokens") if getattr(loop, name) is not None
    ]
    if loop.max_teacher_tokens is not None and not config.needs_teacher:
        problem = (
            f"objective {config.objective.type!r} uses no teacher, so max_teacher_tokens would not "
            "end it; leave the method out, or compare under the same num_steps or max_seconds."
        )
    elif limits and config.schedule_depends_on_num_steps:
        planned = "its schedule" if loop.schedule != "constant" else "its objective"
        problem = (
            f"{planned} is planned over num_steps, which {limits[0]} may end early; give the "
            "comparison num_steps alone, or this method a constant schedule and another objective."
        )
    if problem:
        raise UserError(problem)
