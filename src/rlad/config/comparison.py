"""The TOML file of `rlad compare`. Imports no torch."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rlad.config.file import DEFAULT_RUN, beside, flat, parse_config, parse_overrides, read_toml
from rlad.config.objective import OBJECTIVE_CONFIGS
from rlad.config.presets import PRESETS, expand_preset, merged
from rlad.config.run import OptimizationConfig, RolloutConfig, RunConfig
from rlad.config.types import Count, LearningRate, Location, Mark, NonNegativeInt, Section
from rlad.config.validation import validated
from rlad.errors import UserError

DEFAULT_COMPARISON = Path(__file__).parents[1] / "embedded" / "compare.toml"

_SHARED_OPTIMIZATION = OptimizationConfig.keys_with(Mark.LENGTH, Mark.BUDGET, Mark.NO_NUMBER)


class TuningConfig(Section):
    """The search for each method's learning rate, the same for all: the highest validation pass@1
    after the last step wins."""

    learning_rates: tuple[LearningRate, ...] = Field(min_length=1)
    """learning rates to try for each method"""
    seeds: tuple[NonNegativeInt, ...] = Field((1000,), min_length=1)
    """seeds of the tuning runs; preferably other than the reported seeds"""


class CompareConfig(Section):
    """A comparison of several methods, each with several seeds, under one budget."""

    run: Location | None = None
    """TOML file of the run that all methods share, except for its objective; by default the
    embedded one"""
    directory: Location = "runs/comparison"
    """folder of the runs and the report"""
    seeds: tuple[NonNegativeInt, ...] = Field((0, 1, 2), min_length=1)
    """seeds; each method is trained once with each"""
    jobs: Count = 1
    """number of runs in parallel, each with its share of the cores"""
    shared: dict[str, Any] = Field(default_factory=dict)
    """settings of all runs that replace those of `run`"""
    methods: dict[Annotated[str, Field(min_length=1)], dict[str, Any]] = Field(min_length=1)
    """methods by name, each with its settings; the name of an objective or a preset needs none"""
    baseline: str | None = None
    """method that the others are compared with; by default `grpo`, or otherwise the first"""
    tuning: TuningConfig | None = None
    """first choose each method's learning rate, on the validation split"""

    def problems(self) -> Iterator[str]:
        lists: dict[str, Any] = {"seeds": self.seeds}
        if self.tuning:
            lists |= {f"tuning.{key}": values for key, values in self.tuning}
        for key, values in lists.items():
            if len(set(values)) < len(values):
                yield f"{key} = {list(values)} holds a value twice; name each value once"
        if "seed" in self.shared or "run_dir" in self.shared:
            yield "[shared] sets seed or run_dir, which differ by run; use seeds and directory"
        if self.baseline is not None and self.baseline not in self.methods:
            there_are = ", ".join(self.methods)
            yield f"baseline = {self.baseline!r} is not one of the methods {there_are}"
        # Method names that map to the same folder name would overwrite each other's runs.
        for one, other in itertools.combinations(self.methods, 2):
            if folder_name(one) == folder_name(other):
                yield f"methods {one!r} and {other!r} would share one folder; rename one of them"


def load_comparison(
    path: Path | str | None = None, overrides: list[str] | None = None
) -> tuple[CompareConfig, Path]:
    """Load the comparison in a TOML file (None: the embedded default) with overrides. Also return
    the folder that its relative paths start from.

    Raises `UserError` with one sentence for each mistake, those of its methods included.
    """
    path = DEFAULT_COMPARISON if path is None else Path(path)
    table = read_toml(path)
    if "student" in table and "methods" not in table:
        raise UserError(
            f"{path} is the config of a run, and a comparison has a file of its own: write one "
            f'with run = "{path.name}" and a section [methods.NAME] for each method, such as '
            "[methods.grpo]."
        )
    table = parse_overrides(beside(table, path.parent), overrides or [], of=CompareConfig)
    config = validated(CompareConfig, table)
    for name in config.methods:
        method_config(config, path.parent, name, seed=config.seeds[0])
    return config, path.parent


def folder_name(method: str) -> str:
    """Return the name of a method's folder."""
    return re.sub(r"^\.+|[^\w.=+-]+", "_", method)


def method_config(comparison: CompareConfig, folder: Path, method: str, *, seed: int) -> RunConfig:
    """Make the run of one method with one seed. Raises `UserError` if it is not a valid run, or
    changes the budget that all methods share."""
    changes = comparison.methods[method]
    base_file = Path(comparison.run or DEFAULT_RUN)
    if not base_file.exists():
        base_file = folder / base_file
    base = beside(read_toml(base_file), base_file.parent)
    objective = base.pop("objective", {})
    # The base run's settings of its objective apply only to the method of that name.
    if objective.get("type") != method:
        objective = {"type": _type_by_name(method, comparison)}
    own_objective = changes.get("objective", {})
    if "type" not in own_objective:
        own_objective = objective | own_objective
    own = changes | {"objective": own_objective}
    # Later layers win: the base run, what all methods share, a preset, the method, the seed.
    common = merged(base, comparison.shared)
    kind = common.get("teacher", {}).get("type", "local")
    if own.get("teacher", {}).get("type", kind) != kind:
        del common["teacher"]  # settings of one kind of teacher are unknown keys of another
    table = expand_preset(own, common) | {"seed": seed}
    try:
        if wrong := _shared_settings(changes):
            raise UserError(
                f"sets {', '.join(wrong)}, but all methods share one budget; a method may set the "
                "objective, the teacher, how it optimises and its sampler: put the rest into "
                "[shared]."
            )
        config = parse_config(table)
        if problem := _unfair_limit(config):
            raise UserError(problem)
    except UserError as error:
        lines = [f"method {method!r}: {line}" for line in str(error).splitlines()]
        raise UserError("\n".join(lines)) from None
    return config


def _type_by_name(method: str, comparison: CompareConfig) -> str:
    """Return the objective of a method that sets none: its own name, or the objective that all
    share."""
    if method in OBJECTIVE_CONFIGS or method in PRESETS:
        return method
    return comparison.shared.get("objective", {}).get("type", method)


def _shared_settings(changes: dict[str, Any]) -> list[str]:
    """Return those settings of a method that all methods must share."""
    # In [optimization] a method may choose how it learns, but not for how long; in [rollout], only
    # the sampler. Other sections are the same for all.
    return [key for key in flat(changes) if not _is_of_method(*key.split(".")[:2])]


def _is_of_method(section: str, key: str = "") -> bool:
    if section == "rollout":
        return key in RolloutConfig.of_method
    if section == "optimization":
        return key not in _SHARED_OPTIMIZATION
    return section in ("objective", "teacher")


def _unfair_limit(config: RunConfig) -> str:
    """Say what is wrong if a limit of seconds or teacher tokens never ends a method, or may end its
    schedule early; otherwise empty."""
    loop = config.optimization
    if loop.max_teacher_tokens is not None and not config.needs_teacher:
        return (
            f"objective {config.objective.type!r} uses no teacher, so max_teacher_tokens would "
            "never end it; leave the method out, or compare with num_steps or max_seconds."
        )
    # A schedule planned for 1,000 steps but ended at 600 seconds is a different schedule for each
    # method.
    has_limit = loop.max_seconds is not None or loop.max_teacher_tokens is not None
    if has_limit and config.schedule_depends_on_num_steps:
        planned = "its schedule" if loop.schedule != "constant" else "its objective"
        return (
            f"{planned} depends on num_steps, but max_seconds or max_teacher_tokens may end the "
            "run earlier; give the comparison num_steps only, or this method a constant schedule "
            "and another objective."
        )
    return ""
