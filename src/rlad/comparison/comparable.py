"""Group the runs that may be in one table, and name their methods by what differs."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlad.comparison.figures import Method
from rlad.comparison.finished_runs import MissingRun, Run
from rlad.config.file import flat
from rlad.config.run import OptimizationConfig, RolloutConfig
from rlad.config.types import Mark

Settings = dict[str, Any]

_BUDGET = OptimizationConfig.keys_with(Mark.LENGTH, Mark.BUDGET)
_NO_RESULT = (Mark.NO_NUMBER, Mark.ROUNDING)
_PROBLEMS = "test problems"


@dataclass(frozen=True)
class Group:
    """The methods of one table. They have the same task, student, rollouts, budget and
    evaluation."""

    methods: Sequence[Method]
    settings: Settings
    """the settings that they share"""

    @property
    def first(self) -> Run:
        return self.methods[0].runs[0]

    def differences(self, other: "Group") -> list[str]:
        """List the settings in which this group differs from another, each with both values."""
        keys = _differing([self.settings, other.settings])
        keys.discard(_PROBLEMS)
        told = [
            f"{key}: {_shown(self.settings.get(key))} and {_shown(other.settings.get(key))}"
            for key in sorted(keys)
        ]
        # Different problems are named only if nothing else, such as another task, explains them.
        return told or ["the held-out problems themselves"]


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[MissingRun]]:
    """Group comparable runs in the order of the runs. Also return the runs that are left out as
    duplicates.

    Methods may differ in objective, teacher, sampler and optimiser settings; everything else must
    be equal, including the test problems. Runs of one name that differ in those are separate
    methods, with the differences in their names. A second run of a method with the same seed is
    left out.
    """
    groups = []
    doubles = []
    # One table per set of shared settings; in it one method per name and set of own settings.
    for comparable in _parted(runs, shared_settings):
        methods = []
        for namesakes in _parted(comparable, lambda run: run.method):
            variants = _parted(namesakes, method_settings)
            own_keys = _differing([method_settings(variant[0]) for variant in variants])
            for variant in variants:
                method, left_out = _method(variant, own_keys)
                methods.append(method)
                doubles += left_out
        groups.append(Group(methods, shared_settings(comparable[0])))
    return groups, doubles


def _parted(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[list[Run]]:
    """Group runs by `key`, in the order in which its values first occur."""
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(json.dumps(key(run), sort_keys=True), []).append(run)
    return list(parts.values())


def _method(runs: Sequence[Run], own_keys: set[str]) -> tuple[Method, list[MissingRun]]:
    """Make one method from runs with equal settings. Settings that distinguish it from methods of
    the same name are added to its name."""
    settings = method_settings(runs[0])
    own = [f"{key.rpartition('.')[2]} = {_shown(settings.get(key))}" for key in sorted(own_keys)]
    name = runs[0].method + (f" ({', '.join(own)})" if own else "")
    # Two runs with one seed are not independent evidence, so only the first counts.
    by_seed: dict[int, Run] = {}
    doubles = []
    for run in runs:
        first = by_seed.setdefault(run.seed, run)
        if first is not run:
            reason = (
                f"{run.path} is a second run of this method and seed; the one in {first.path} is "
                "shown."
            )
            doubles.append(MissingRun(run.method, run.seed, reason))
    return Method(name, [by_seed[seed] for seed in sorted(by_seed)]), doubles


def shared_settings(run: Run) -> Settings:
    """Flatten the settings that are equal for all runs of a table, with a fingerprint of the
    held-out problems."""
    # Of the optimiser settings only the budget is shared: learning rate and the like belong to the
    # method, as does the sampler.
    table = run.config.dump(without=_NO_RESULT)
    for section in ("seed", "objective", "teacher"):
        del table[section]
    for key in RolloutConfig.of_method:
        del table["rollout"][key]
    table["optimization"] = {key: table["optimization"][key] for key in _BUDGET}
    # Problems may differ with equal settings, if another version of a task generates them.
    problems = [
        (r.index, r.key, r.difficulty, r.prompt, r.num_samples)
        for results in (run.after, run.ood_after)
        for r in results
    ]
    digest = hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:8]
    return flat(table) | {_PROBLEMS: digest}


def method_settings(run: Run) -> Settings:
    """Flatten the settings of the method: objective, teacher if it needs one, sampler and
    optimiser."""
    config = run.config
    # A teacher that the objective never asks is not part of the method, even if configured.
    sections = ["objective", "optimization"] + ["teacher"] * config.needs_teacher
    table = config.dump(without=(*_NO_RESULT, Mark.LENGTH, Mark.BUDGET))
    table["rollout"] = {key: table["rollout"][key] for key in RolloutConfig.of_method}
    settings = flat({section: table[section] for section in [*sections, "rollout"]})
    return {key: value for key, value in settings.items() if value is not None}


def _differing(settings: Sequence[Settings]) -> set[str]:
    """Collect the keys whose values differ between some settings."""
    keys = set().union(*settings)
    return {key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)}


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
