"""What `rlad compare` is to do: its TOML file. Imports no torch."""

import os
import re
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
    """The same search for every method: the learning rate with the highest validation pass@1 behind
    the last step."""

    learning_rates: tuple[LearningRate, ...] = Field(min_length=1)
    """tried for each method"""
    seeds: tuple[NonNegativeInt, ...] = Field((1000,), min_length=1)
    """of the tuning runs; best none of the seeds that are reported"""


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
    shared: dict[str, Any] = {}
    """settings of all runs that differ from those of `run`"""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """name -> its settings; a name that is an objective or a preset needs none"""
    baseline: str | None = None
    """the method that the others are compared with; by default `grpo`, or else the first"""
    tuning: TuningConfig | None = None
    """choose each method's learning rate first, on the validation split"""

    @model_validator(mode="after")
    def _fits_together(self) -> "CompareConfig":
        tuning = self.tuning
        seeds, rates = (
            (tuning.seeds, [f"{rate:g}" for rate in tuning.learning_rates]) if tuning else ((), [])
        )
        for name, values in (
            ("seeds", self.seeds),
            ("tuning.seeds", seeds),
            ("tuning.learning_rates", rates),
        ):
            if len(set(values)) < len(values):
                raise UserError(
                    f"{name} = {list(values)} holds a value twice; each run needs one of its own"
                )
        if "seed" in self.shared or "run_dir" in self.shared:
            raise UserError(
                "[shared] sets seed or run_dir, which belong to single runs; use seeds and "
                "directory"
            )
        if self.baseline is not None and self.baseline not in self.methods:
            raise UserError(
                f"baseline = {self.baseline!r} is none of the methods; there are "
                f"{', '.join(self.methods)}"
            )
        return self


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
    for section, value in changes.items():
        if section in ("objective", "teacher"):
            continue
        wrong = [section]
        if isinstance(value, dict):
            shared = _SHARED_OPTIMIZATION if section == "optimization" else value
            wrong = [f"{section}.{key}" for key in value if key in shared]
        if wrong:
            raise UserError(
                f"method {method!r} sets {', '.join(wrong)}, but all methods share one "
                "budget; a method may set "
                "objective, teacher and how it optimises: put the rest into [shared]."
            )
    base = read_toml(
        DEFAULT_RUN if comparison.run is None else Path(os.path.join(folder, comparison.run))
    )
    objective = base.pop("objective", {})
    # The base run's own settings of its objective are those of the method of that name.
    named = (
        {}
        if "objective" in changes
        else {"objective": objective if objective.get("type") == method else {"type": method}}
    )
    try:
        config = parse_config(
            expand_preset(named | changes, merged(base, comparison.shared)) | {"seed": seed}
        )
        _require_a_fair_limit(config)
        return config
    except UserError as error:
        raise UserError(
            "\n".join(f"method {method!r}: {line}" for line in str(error).splitlines())
        ) from None


def _require_a_fair_limit(config: RunConfig) -> None:
    """`UserError` when a limit of seconds or teacher tokens means nothing to a method, or
    something else than its steps."""
    loop = config.optimization
    if loop.max_teacher_tokens is not None and not config.needs_teacher:
        raise UserError(
            f"objective {config.objective.type!r} uses no teacher, so max_teacher_tokens would not "
            "end it; leave the method "
            "out, or compare under the same num_steps or max_seconds."
        )
    limits = [
        name for name in ("max_seconds", "max_teacher_tokens") if getattr(loop, name) is not None
    ]
    planned = (
        "its schedule"
        if loop.schedule != "constant"
        else "opd_share"
        if config.objective.schedule_depends_on_num_steps
        else ""
    )
    if limits and planned:
        raise UserError(
            f"{planned} is planned over num_steps, which {limits[0]} may end early; give the "
            "comparison num_steps alone, or "
            "this method a constant schedule and another objective."
        )
