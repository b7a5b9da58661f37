"""Read a run's TOML file with dotted overrides, and write it."""

import ast
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import Field

from rlad.config.objective import ObjectiveConfig
from rlad.config.presets import expand_preset
from rlad.config.run import RunConfig
from rlad.config.types import Mark, Section
from rlad.config.validation import takes_text, validated
from rlad.errors import UserError

CONFIG = "config.toml"
DEFAULT_RUN = Path(__file__).parents[1] / "embedded" / "run.toml"


_CHOICE = re.compile(r"(objective|task|teacher)(\.type)?=")
_PYTHON = re.compile(r"(?=[^0-9]*[0-9])[-+0-9.eE, \[\]]+|True|False")


class _Objective(Section):
    objective: Annotated[ObjectiveConfig, Field(discriminator="type")]


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the run described by a TOML file (None: the embedded default) with `key.path=value`
    overrides applied.

    For a run directory, its config is loaded and the directory becomes `run_dir`, even if it was
    moved. Relative paths in a file are looked up next to the file, then in the working directory.
    Relative paths in overrides start from the working directory.
    `section=name` selects another objective, task or teacher by its type and replaces the whole
    section. Raises `UserError` with one sentence for each mistake.
    """
    path = DEFAULT_RUN if path is None else Path(path)
    if (path / CONFIG).is_file():
        table = read_toml(path / CONFIG) | {"run_dir": str(path)}
    else:
        table = beside(read_toml(path), path.parent)
    return parse_config(parse_overrides(table, overrides))


def parse_overrides(
    table: dict[str, Any], overrides: Sequence[str], *, of: type[Section] = RunConfig
) -> dict[str, Any]:
    """Apply `key.path=value` overrides to the `table` of a section. Raises `UserError` for an
    override of another form.

    A preset among them overrides the table, and the other overrides override the preset.
    """
    # Choices of a type come first, because they start a section anew. A preset is an objective with
    # settings in other sections, so its settings come next, then the user's other overrides.
    choices = [override for override in overrides if _CHOICE.match(override)]
    for override in choices:
        _apply(table, _CHOICE.sub(r"\1=", override), of)
    if any(override.startswith("objective") for override in choices):
        # A teacher chosen in the overrides wins over the objective's default teacher.
        chosen = {override.partition("=")[0].partition(".")[0] for override in choices}
        sections = {key: table.pop(key) for key in ("objective", "teacher") if key in chosen}
        table = expand_preset(sections, table)
    for override in overrides:
        if override not in choices:
            _apply(table, override, of)
    return table


def parse_config(table: dict[str, Any]) -> RunConfig:
    """Make a run from nested dictionaries and expand presets. Raises `UserError` with one sentence
    for each mistake."""
    return validated(RunConfig, expand_preset(table))


def parse_objective(section: dict[str, Any]) -> Any:
    """Make an `[objective]` section. Raises `UserError` with one sentence for each mistake."""
    return validated(_Objective, {"objective": section}).objective


def dump_config(config: RunConfig) -> str:
    """Return the complete resolved run as TOML. Loading it gives the same run."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def changed_settings(config: RunConfig) -> dict[str, Any]:
    """Return dotted keys and values of the settings that differ from the defaults, and the types of
    tasks and objective."""
    # Types are always shown: without them the other settings of a section cannot be read.
    changed = flat(config.model_dump(mode="json", exclude_defaults=True))
    settings = flat(config.model_dump(mode="json", exclude_none=True))
    is_type = re.compile(r"objective\.type|task\.(.*\.)?type").fullmatch
    return {key: value for key, value in settings.items() if key in changed or is_type(key)}


def differing_settings(found: RunConfig, wanted: RunConfig) -> list[str]:
    """Return the settings in which two runs differ, with both values. Settings that change no
    number do not count."""
    ours = flat(found.dump(without=(Mark.NO_NUMBER,)))
    theirs = flat(wanted.dump(without=(Mark.NO_NUMBER,)))
    keys = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    return [f"{key} is {ours.get(key)!r} instead of {theirs.get(key)!r}" for key in keys]


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file. Raises `UserError` if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    # An integer of thousands of digits is a plain ValueError, as are TOML's and UTF-8's errors.
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not valid TOML: {error}"
        raise UserError(
            f"config {path} cannot be read ({reason}); give a valid TOML file or a run directory, "
            "or none for the embedded example."
        ) from None


# A config is only a few tables deep; deeper tables are refused later as unknown keys.
_MAX_DEPTH = 10
_NAMES_OF_FILES = ("path", "validation_path", "test_path", "model", "adapter", "run")


def beside(table: Any, folder: Path, depth: int = 0) -> Any:
    """Return the tables of a file in `folder`. A relative path that exists in `folder` is rewritten
    to be relative to the working directory."""
    if isinstance(table, list):
        return [beside(one, folder, depth + 1) for one in table]
    if not isinstance(table, dict) or depth > _MAX_DEPTH:
        return table
    found = {}
    for key, value in table.items():
        is_name = key in _NAMES_OF_FILES and isinstance(value, str) and len(value) < 256
        is_relative = is_name and value and not Path(value).is_absolute()
        is_there = is_relative and (folder / value).exists()
        inner = beside(value, folder, depth + 1)
        found[key] = os.path.relpath(folder / value) if is_there else inner
    return found


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _value(text: str) -> Any:
    """Read a value as TOML, or else as one that only Python has: `.5`, `[.8, .9]`, `True`. Anything
    else is a string, such as a bare word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        if not _PYTHON.fullmatch(text):
            return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _apply(table: dict[str, Any], override: str, of: type[Section]) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(
            f"override {override!r} is not of the form key.path=value, for example "
            "optimization.num_steps=50."
        )
    value = _value(text)
    # Walk along the path, and create missing tables on the way.
    *sections, key = path.split(".")
    if takes_text(of, [*sections, key]) and not isinstance(value, str):
        value = text  # run_dir=2024-05-01 is no date
    if sections == ["objective"]:
        # A setting without a chosen objective is one of the default objective.
        table.setdefault("objective", {"type": RunConfig.model_fields["objective"].default.type})
    for section in sections:
        if not isinstance(table.get(section), dict):
            table[section] = {}
        table = table[section]
    # `teacher=ema` selects a type. Settings of another type would be unknown keys of the new one,
    # so the section starts empty, unless it has that type already.
    present = table.get(key)
    default = "local" if path == "teacher" else value
    has_type = isinstance(present, dict) and "type" in present
    names_a_type = has_type or key in ("objective", "task", "teacher")
    if not (names_a_type and isinstance(value, str)):
        table[key] = value
    elif not isinstance(present, dict) or present.setdefault("type", default) != value:
        table[key] = {"type": value}
