"""Reading a run's TOML with dotted overrides, writing it back, and saying in one sentence what is wrong with it."""

import difflib
import tomllib
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError

from rlad.config import RunConfig

DEFAULT_RUN = Path(__file__).parent / "models" / "run.toml"


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by a TOML file (None: the embedded default) with `key.path=value` overrides applied.

    `section=name` selects another objective, task or teacher by its type and replaces that whole section.
    Raises `ValueError` with one sentence for each mistake.
    """
    path = DEFAULT_RUN if path is None else path
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"config {path} is not a file; give the path of a TOML file, or none for the default run.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not valid TOML: {error}; mend that line.") from None
    return parse_config(parse_overrides(table, overrides))


def parse_overrides(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`table` with `key.path=value` overrides applied to it; `ValueError` for one that is not of that form."""
    for override in overrides:
        _apply(table, override)
    return table


def parse_config(table: dict[str, Any]) -> RunConfig:
    """A validated run from nested dictionaries; `ValueError` with one sentence for each mistake."""
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise ValueError("\n".join(_sentences(error.errors(include_url=False)))) from None


def dump_config(config: RunConfig) -> str:
    """The complete resolved run as TOML; loading it gives the same run."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"override {override!r} is not of the form key.path=value, for example optimization.num_steps=50.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *sections, key = path.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ValueError(f"override {override!r}: {section} is a single value, not a section.")
    is_section = isinstance(table.get(key), dict) or (not sections and key in ("objective", "task", "teacher"))
    table[key] = {"type": value} if is_section and isinstance(value, str) else value


def _sentences(errors: Sequence[Any]) -> list[str]:
    """One sentence for each wrong key; the alternatives of a union are joined by "or"."""
    sentences: dict[str, str] = {}
    for error in errors:
        location = error["loc"]
        if any(len(e["loc"]) > len(location) and e["loc"][: len(location)] == location for e in errors):
            continue  # only says that a part of it is wrong
        where, message = _explain(error)
        sentences[where] = f"{sentences[where]}, or {message}" if where in sentences else f"{where} {message}"
    return [s.strip() if s.endswith("?") else f"{s.strip()}." for s in sentences.values()]


def _explain(error: Any) -> tuple[str, str]:
    is_about_a_key = error["type"] in ("extra_forbidden", "missing")
    where, keys = _resolve(error["loc"][:-1] if is_about_a_key else error["loc"])
    match error["type"]:
        case "extra_forbidden":
            unknown = str(error["loc"][-1])
            near = difflib.get_close_matches(unknown, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "valid keys there are " + ", ".join(sorted(keys))
            return f"{where}.{unknown}".lstrip("."), f"is an unknown key: {hint}"
        case "missing":
            return f"{where}.{error['loc'][-1]}".lstrip("."), "is missing: add it to the config"
        case "union_tag_invalid":
            tag, tags = str(error["ctx"]["tag"]), [t.strip(" '") for t in error["ctx"]["expected_tags"].split(",")]
            near = difflib.get_close_matches(tag, tags, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            return f"{where}.type", f"is {tag!r}: use one of {', '.join(tags)}{hint}"
        case "union_tag_not_found":
            return f"{where}.type", "is missing: every such section names its type"
        case "value_error":
            return where, f"is wrong: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
        case _:
            return where, f"is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _resolve(location: Sequence[str | int]) -> tuple[str, list[str]]:
    """The dotted path as the user wrote it (pydantic adds its own names of union members), and the keys valid at its end."""
    models: list[type[BaseModel]] = [RunConfig]
    shown = ""
    for part in location:
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        tagged = [m for m in models if "type" in m.model_fields and part in get_args(m.model_fields["type"].annotation)]
        if isinstance(part, int):
            shown += f"[{part}]"
        elif part in fields:
            shown += f".{part}"
            models = list(_models_in(fields[part].annotation))
        elif tagged:
            models = tagged
    return shown.lstrip("."), [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType):
        for part in get_args(annotation):
            yield from _models_in(part)
