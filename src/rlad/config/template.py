"""Templates with `{names}` that are filled with texts which nobody checked: braces in a text mean
nothing. Imports no torch."""

from collections.abc import Mapping
from string import Formatter

from rlad.errors import UserError


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Text and the name behind it (None behind the last), with `{{` and `}}` for braces themselves.

    Raises `UserError` for a brace without its partner, and for a format or conversion behind a
    name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"its braces do not match ({error}); write {{{{ and }}}} for braces that the teacher "
            "shall see"
        ) from None
    for _, name, spec, conversion in parts:
        if spec or conversion:
            raise UserError(f"{{{name}}} has a format behind its name; write {{{name}}} alone")
    return [(text, name) for text, name, _, _ in parts]


def template_names(template: str) -> set[str]:
    """The names that a template wants. `UserError` as in `template_parts`."""
    return {name for _, name in template_parts(template) if name is not None}


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """The template with `values` in the place of their names."""
    return "".join(
        text + ("" if name is None else values[name]) for text, name in template_parts(template)
    )
