"""Validate sections of a config, and explain each mistake in one sentence."""

import difflib
import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from rlad.config.presets import PRESETS
from rlad.config.types import Section, sections_in
from rlad.errors import UserError
from rlad.text import nearest

_NAMES_ELSEWHERE = {
    "lr": "learning_rate",
    "steps": "num_steps",
    "max_steps": "num_steps",
    "beta": "kl_coef",
    "batch_size": "prompts_per_batch",
    "num_generations": "group_size",
    "max_new_tokens": "max_completion_tokens",
    "max_tokens": "max_completion_tokens",
    "output_dir": "run_dir",
}
"""Settings of TRL, transformers, verl and vLLM -> ours."""

SomeSection = TypeVar("SomeSection", bound=Section)


def validated(section: type[SomeSection], table: dict[str, Any]) -> SomeSection:
    """Validate `table` as a section. Raises `UserError` with one sentence for each mistake."""
    try:
        return section.model_validate(table)
    except ValidationError as error:
        sentences = _sentences(section, error.errors(include_url=False))
        raise UserError("\n".join(sentences)) from None


def takes_text(section: type[Section], path: Sequence[str]) -> bool:
    """Return whether the setting at a dotted path can only be a text."""
    sections = [section]
    annotations: list[Any] = []
    names_an_entry = False
    for part in path:
        if names_an_entry:
            names_an_entry = False
            continue
        annotations = [
            one.model_fields[part].annotation for one in sections if part in one.model_fields
        ]
        sections = [inner for one in annotations for inner in sections_in(one)]
        names_an_entry = any(get_origin(one) is dict for one in annotations)
    return bool(annotations) and all(map(_is_text, annotations))


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return all(part is NoneType or _is_text(part) for part in get_args(annotation))
    return annotation is str


def _sentences(section: type[Section], errors: Sequence[Any]) -> list[str]:
    """Write one sentence for each wrong key, with the alternatives of a union joined by "or"."""
    found = [(*_explain(section, error), error) for error in errors]
    places = [where for where, _, _ in found]
    sentences: dict[str, str] = {}
    for where, message, error in found:
        # Skip an error that only repeats that a part is wrong, and the alternative of a union that
        # the user did not mean.
        has_parts = any(place.startswith((f"{where}.", f"{where}[")) for place in places)
        if has_parts or (places.count(where) > 1 and _is_of_another_kind(error)):
            continue
        if where in sentences:
            sentences[where] += f", or {message.partition(': ')[2]}"
        else:
            sentences[where] = f"{where} {message}"
    stripped = [sentence.strip() for sentence in sentences.values()]
    return [each if each.endswith(("?", ".")) else f"{each}." for each in stripped]


def _is_of_another_kind(error: Any) -> bool:
    """Return whether an error says that a number is no table, or that a table is no number."""
    is_no_number = error["type"] == "float_type" and isinstance(error["input"], dict)
    return error["type"] == "model_type" or is_no_number


def _explain(section: type[Section], error: Any) -> tuple[str, str]:
    """Return the key that an error of pydantic is about, and the rest of the sentence."""
    kind = error["type"]
    is_unknown = kind == "extra_forbidden"
    where, keys = _resolve(section, error["loc"][:-1] if is_unknown else error["loc"])
    if is_unknown:
        key = str(error["loc"][-1])
        hint = _hint(section, where, key, keys)
        return f"{where}.{key}".lstrip("."), f"is an unknown key: {hint}"
    if kind == "missing":
        return where, "is missing: add it to the config"
    if kind == "union_tag_not_found":
        return f"{where}.type", "is missing: this section must name its type"
    if kind == "union_tag_invalid":
        tag = str(error["ctx"]["tag"])
        tags = [each.strip(" '") for each in error["ctx"]["expected_tags"].split(",")]
        tags += PRESETS if where == "objective" else ()
        hint = nearest(tag, tags)
        allowed = f"it must be one of {', '.join(tags)}{', ' * bool(hint)}{hint}"
        return f"{where}.type", f"is {tag!r}: {allowed}"
    if kind == "value_error":
        sentence = str(error["ctx"]["error"])
        return where, f"is wrong: {sentence}" if where else sentence
    return where, f"is {_shown(error['input'])}: {_requirement(error)}"


def _hint(section: type[Section], where: str, key: str, keys: Sequence[str]) -> str:
    """Say what a user may have meant by an unknown key: a key of another type of this section, of
    the same section, of another section, or another tool's name for it."""
    name = _NAMES_ELSEWHERE.get(key, key)
    if where in section.model_fields:
        of_types = [
            get_args(one.model_fields["type"].annotation)[0]
            for one in sections_in(section.model_fields[where].annotation)
            if key in one.model_fields
        ]
        if of_types:
            return f"it belongs to {where}.type = {', '.join(map(repr, of_types))}"
    if near := nearest(name, keys):
        return near
    elsewhere = {
        inner_key: f"{field_name}.{inner_key}"
        for field_name, field in section.model_fields.items()
        for inner in sections_in(field.annotation)
        for inner_key in inner.model_fields
        if field_name != where
    }
    close = difflib.get_close_matches(name, elsewhere, n=1)
    if close and not where:
        return f"did you mean {elsewhere[close[0]]!r}?"
    return f"valid keys there are {', '.join(sorted(keys))}" if keys else "it has no settings"


def nearest_key(section: type[Section], key: str) -> str:
    """Ask whether the nearest key of any section was meant; empty if none is near."""
    near = _hint(section, "", key, list(section.model_fields))
    return near if near.startswith("did you mean") else ""


def _requirement(error: Any) -> str:
    """Say what a value must be instead."""
    if error["type"] in ("model_type", "model_attributes_type"):
        return "it must be a section, with keys of its own"
    if error["type"] == "tuple_type":
        return "it must be a list"
    if error["type"] in ("too_short", "too_long"):
        return re.sub(r"^\w+ should", "it must", error["msg"].partition(" after")[0])
    return re.sub(r"^(Input|String) should", "it must", error["msg"])


def _shown(value: Any) -> str:
    """Return the start of a wrong value for an error message, without passwords in addresses."""
    shown = re.sub(r"//[^/@\s]{1,200}@", "//***@", repr(value))
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _resolve(section: type[Section], location: Sequence[str | int]) -> tuple[str, list[str]]:
    """Return the dotted path as the user wrote it (pydantic adds names of union members), and the
    keys that are valid there."""
    sections = [section]
    shown = ""
    names_an_entry = False
    for part in location:
        fields = {name: field for each in sections for name, field in each.model_fields.items()}
        # In pydantic's path, the `type` of a union's section comes before the section's keys.
        types = [each for each in sections if "type" in each.model_fields]
        tagged = [one for one in types if part in get_args(one.model_fields["type"].annotation)]
        if isinstance(part, int):
            shown += f"[{part}]"
        elif names_an_entry:
            shown += f".{part}"
            names_an_entry = False
        elif part in fields:
            shown += f".{part}"
            names_an_entry = get_origin(fields[part].annotation) is dict
            sections = sections_in(fields[part].annotation)
        elif tagged:
            sections = tagged
    return shown.lstrip("."), [name for each in sections for name in each.model_fields]
