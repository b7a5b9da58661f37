"""Reading a run's TOML with dotted overrides, writing it back, and saying in one sentence what is
wrong with it."""

import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from rlad.config.objective import ObjectiveConfig
from rlad.config.presets import PRESETS, expand_preset
from rlad.config.run import RunConfig
from rlad.config.types import Mark, Section, sections_in
from rlad.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class _Objective(Section):
    objective: Annotated[ObjectiveConfig, Field(discriminator="type")]


CONFIG = "config.toml"
_MOST_SHOWN = 200
"""characters of a wrong value in an error message"""
DEFAULT_RUN = Path(__file__).parents[1] / "embedded" / "run.toml"


def load_config(path: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by a TOML file (None: the embedded default) with `key.path=value` overrides
    applied.

    A run directory stands for the config in it, and is then the `run_dir`, wherever it was moved.
    `section=name` selects another objective, task or teacher by its type and replaces that whole
    section. Raises `UserError` with one sentence for each mistake.
    """
    path = DEFAULT_RUN if path is None else Path(path)
    if (path / CONFIG).is_file():
        return parse_config(
            parse_overrides(read_toml(path / CONFIG) | {"run_dir": str(path)}, overrides)
        )
    return parse_config(parse_overrides(read_toml(path), overrides))


def parse_overrides(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`table` with `key.path=value` overrides applied to it; `UserError` for one that is not of
    that form.

    A preset among them changes what the table says; the other overrides change the preset.
    """
    choices = [
        override
        for override in overrides
        if override.partition("=")[0].strip() in ("objective", "objective.type")
    ]
    for override in choices:
        _apply(table, override)
    if choices:
        table = expand_preset(
            {"objective": table["objective"]},
            {key: table[key] for key in table if key != "objective"},
        )
    for override in overrides:
        if override not in choices:
            _apply(table, override)
    return table


def parse_config(table: dict[str, Any]) -> RunConfig:
    """A validated run from nested dictionaries, presets spelled out; `UserError` with one sentence
    for each mistake."""
    return validated(RunConfig, expand_preset(table))


def parse_objective(section: dict[str, Any]) -> Any:
    """A validated `[objective]` section; `UserError` with one sentence for each mistake."""
    return validated(_Objective, {"objective": section}).objective


def validated(model: type[Model], table: dict[str, Any]) -> Model:
    """`table` as a config of this kind; `UserError` with one sentence for each mistake."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise UserError("\n".join(_sentences(model, error.errors(include_url=False)))) from None


def dump_config(config: RunConfig) -> str:
    """The complete resolved run as TOML; loading it gives the same run."""
    return tomli_w.dumps(_type_first(config.model_dump(mode="json", exclude_none=True)))


def changed_settings(config: RunConfig) -> dict[str, Any]:
    """Dotted keys and values of what differs from the defaults, and the types of tasks and
    objective."""

    def names_a_type(key: str) -> bool:
        return key == "objective.type" or (key.startswith("task.") and key.endswith(".type"))

    changed = dict(_flat(config.model_dump(mode="json", exclude_defaults=True)))
    settings = _flat(_type_first(config.model_dump(mode="json", exclude_none=True)))
    return {key: value for key, value in settings if key in changed or names_a_type(key)}


def differing_settings(found: RunConfig, wanted: RunConfig) -> list[str]:
    """The dotted settings in which two runs differ, with both values; those that change no number
    do not count."""
    tables = [dict(_flat(config.dump(without=(Mark.NO_NUMBER,)))) for config in (found, wanted)]
    keys = [
        key
        for key in dict.fromkeys((*tables[0], *tables[1]))
        if tables[0].get(key) != tables[1].get(key)
    ]
    return [f"{key} is {tables[0].get(key)!r} instead of {tables[1].get(key)!r}" for key in keys]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; `UserError` with one sentence when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"config {path} cannot be read ({error.strerror}); give the path of a TOML file or of "
            "a run directory, "
            "or none for the embedded example."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"config {path} is not valid TOML: {error}; fix that line.") from None


def _type_first(table: dict[str, Any]) -> dict[str, Any]:
    head = {"type": table["type"]} if "type" in table else {}
    return head | {
        key: _type_first(value) if isinstance(value, dict) else value
        for key, value in table.items()
    }


def _flat(table: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _apply(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(
            f"override {override!r} is not of the form key.path=value, for example "
            "optimization.num_steps=50."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text  # a bare word is a string
    *sections, key = path.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UserError(f"override {override!r}: {section} is a single value, not a section.")
    present = table.get(key)
    names_a_type = isinstance(present, dict) or (
        not sections and key in ("objective", "task", "teacher")
    )
    if not (names_a_type and isinstance(value, str)):
        table[key] = value
    elif not isinstance(present, dict) or present.setdefault("type", value) != value:
        table[key] = {"type": value}


def _sentences(model: type[BaseModel], errors: Sequence[Any]) -> list[str]:
    """One sentence for each wrong key; the alternatives of a union are joined by "or"."""
    found = [(*_explain(model, error), _is_of_another_kind(error)) for error in errors]
    sentences: dict[str, str] = {}
    for where, message, is_of_another_kind in found:
        only_says_that_a_part_is_wrong = any(
            other.startswith((f"{where}.", f"{where}[")) for other, _, _ in found
        )
        is_alone = sum(other == where for other, _, _ in found) == 1
        if only_says_that_a_part_is_wrong or (is_of_another_kind and not is_alone):
            continue
        known = sentences.get(where)
        sentences[where] = (
            f"{known}, or {message.partition(': ')[2]}" if known else f"{where} {message}"
        )
    return [s.strip() if s.endswith("?") else f"{s.strip()}." for s in sentences.values()]


def _is_of_another_kind(error: Any) -> bool:
    """Whether it says that a number is no table, or a table no number: of a union, the alternative
    that was not meant."""
    return error["type"] == "model_type" or (
        error["type"] == "float_type" and isinstance(error["input"], dict)
    )


def _explain(model: type[BaseModel], error: Any) -> tuple[str, str]:
    """Which key an error of pydantic is about, and what is to be said of it."""
    where, keys = _resolve(
        model, error["loc"][:-1] if error["type"] == "extra_forbidden" else error["loc"]
    )
    match error["type"]:
        case "extra_forbidden":
            unknown = str(error["loc"][-1])
            near = difflib.get_close_matches(unknown, keys, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else "valid keys there are " + ", ".join(sorted(keys))
            )
            return f"{where}.{unknown}".lstrip("."), f"is an unknown key: {hint}"
        case "missing":
            return where, "is missing: add it to the config"
        case "union_tag_invalid":
            tag, tags = (
                str(error["ctx"]["tag"]),
                [t.strip(" '") for t in error["ctx"]["expected_tags"].split(",")],
            )
            tags += PRESETS if where == "objective" else ()
            near = difflib.get_close_matches(tag, tags, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            return f"{where}.type", f"is {tag!r}: it must be one of {', '.join(tags)}{hint}"
        case "union_tag_not_found":
            return f"{where}.type", "is missing: every such section names its type"
        case "model_type" | "model_attributes_type":
            return where, f"is {_shown(error['input'])}: it must be a section, with keys of its own"
        case "tuple_type":
            return where, f"is {_shown(error['input'])}: it must be a list"
        case "too_short" | "too_long":
            message = re.sub(r"^\w+ should", "it must", error["msg"].partition(" after")[0])
            return where, f"is {_shown(error['input'])}: {message}"
        case "value_error":
            return where, f"is wrong: {error['ctx']['error']}" if where else str(
                error["ctx"]["error"]
            )
        case _:
            return where, f"is {_shown(error['input'])}: " + error["msg"].replace(
                "Input should be", "it must be"
            )


def _shown(value: Any) -> str:
    """A wrong value in an error message: its beginning, and no password of an address in it."""
    shown = re.sub(r"//[^/@\s]{1,200}@", "//***@", repr(value))
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."


def _resolve(model: type[BaseModel], location: Sequence[str | int]) -> tuple[str, list[str]]:
    """The dotted path as the user wrote it (pydantic adds its own names of union members), and the
    keys valid at its end."""
    models = [model]
    shown, names_an_entry = "", False
    for part in location:
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        tagged = [
            m
            for m in models
            if "type" in m.model_fields and part in get_args(m.model_fields["type"].annotation)
        ]
        if isinstance(part, int):
            shown += f"[{part}]"
        elif names_an_entry:
            shown += f".{part}"
            names_an_entry = False
        elif part in fields:
            shown += f".{part}"
            names_an_entry = get_origin(fields[part].annotation) is dict
            models = sections_in(fields[part].annotation)
        elif tagged:
            models = tagged
    return shown.lstrip("."), [name for model in models for name in model.model_fields]
