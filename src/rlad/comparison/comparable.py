"""Which runs may stand in one table, and what tells their methods apart."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlad.comparison.runs import MissingRun, Run
from rlad.config.run import OptimizationConfig
from rlad.config.types import Mark

Settings = dict[str, Any]

_BUDGET = OptimizationConfig.keys_with(Mark.LENGTH, Mark.BUDGET)
_NO_RESULT = (Mark.NO_NUMBER, Mark.ROUNDING)
_PROBLEMS = "test problems"


@dataclass(frozen=True)
class Method:
    """The runs of one method, one for each seed, by seed."""

    name: str
    runs: Sequence[Run]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]


@dataclass(frozen=True)
class Group:
    """Methods that were given the same task, student, rollouts, budget and evaluation: they stand
    in one table."""

    methods: Sequence[Method]
    settings: Settings
    """what they share"""

    @property
    def first(self) -> Run:
        return self.methods[0].runs[0]

    def differences(self, other: "Group") -> list[str]:
        """The settings in which this group is not like another, each with both values."""
        return _differences(self.settings, other.settings)


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[MissingRun]]:
    """Groups of comparable runs in the order of the runs, and the runs that are left out as
    doubles.

    Methods may differ in objective, teacher and in how the optimiser works; all else must be equal,
    the test problems included. Runs of one name that differ in those are methods of their own, with
    what differs in the name. A second run of a method with the same seed is left out.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        by_settings.setdefault(json.dumps(shared_settings(run), sort_keys=True), []).append(run)
    groups, doubles = [], []
    for chosen in by_settings.values():
        methods, left_out = _methods(chosen)
        groups.append(Group(methods, shared_settings(chosen[0])))
        doubles += left_out
    return groups, doubles


def shared_settings(run: Run) -> Settings:
    """Dotted settings that are equal for all runs of a table, and a fingerprint of the held-out
    problems."""
    table = run.config.dump(without=_NO_RESULT)
    for section in ("seed", "objective", "teacher"):
        del table[section]
    table["optimization"] = {key: table["optimization"][key] for key in _BUDGET}
    problems = [
        (r.index, r.key, r.difficulty, r.prompt, r.num_samples)
        for results in (run.after, run.ood_after)
        for r in results
    ]
    digest = hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:8]
    return _flat(table) | {_PROBLEMS: digest}


def method_settings(run: Run) -> Settings:
    """Dotted settings that make the method: objective, teacher where it needs one, and
    optimiser."""
    config = run.config
    sections = ["objective", "optimization"] + ["teacher"] * config.needs_teacher
    table = config.dump(without=(*_NO_RESULT, Mark.LENGTH, Mark.BUDGET))
    settings = _flat({section: table[section] for section in sections})
    return {key: value for key, value in settings.items() if value is not None}


def _methods(runs: Sequence[Run]) -> tuple[list[Method], list[MissingRun]]:
    variants: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        variants.setdefault(
            (run.method, json.dumps(method_settings(run), sort_keys=True)), []
        ).append(run)
    methods, doubles = [], []
    for (name, _), chosen in variants.items():
        by_seed: dict[int, Run] = {}
        for run in chosen:
            if by_seed.setdefault(run.seed, run) is not run:
                reason = f"{run.path} is a second run of this method and seed; the one in {by_seed[run.seed].path} is shown."
                doubles.append(MissingRun(run.method, run.seed, reason))
        namesakes = [
            method_settings(others[0]) for (other, _), others in variants.items() if other == name
        ]
        full_name = name + _what_is_its_own(method_settings(chosen[0]), namesakes)
        methods.append(Method(full_name, [by_seed[seed] for seed in sorted(by_seed)]))
    return methods, doubles


def _what_is_its_own(settings: Settings, namesakes: Sequence[Settings]) -> str:
    """The settings in which a method differs from the others of its name, in parentheses."""
    keys = {
        key
        for one in namesakes
        for key in one
        if any(one[key] != other.get(key) for other in namesakes)
    }
    own = [f"{key.rpartition('.')[2]} = {_shown(settings.get(key))}" for key in sorted(keys)]
    return f" ({', '.join(own)})" if own else ""


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    keys = [key for key in dict.fromkeys((*one, *other)) if one.get(key) != other.get(key)]
    told = [key for key in keys if key != _PROBLEMS]
    # Another task has other problems; that the problems differ is told where nothing else explains
    # it.
    said = [f"{key}: {_shown(one.get(key))} and {_shown(other.get(key))}" for key in told]
    return said or ["the held-out problems themselves"]


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Settings:
    flat: Settings = {}
    for key, value in table.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
