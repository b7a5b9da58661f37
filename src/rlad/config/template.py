"""Templates with `{names}` that are filled with texts which nobody checked: braces in a text mean
nothing. Imports no torch."""

import re
from collections.abc import Mapping

from rlad.errors import UserError

# `{{` or `}}` for a brace itself, or a name between braces.
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}!:]*)\}")


def template_names(template: str) -> set[str]:
    """The names that a template wants. `UserError` for a brace without its partner, and for a
    format or conversion after a name."""
    if re.search("[{}]", _FIELD.sub("", template)):
        raise UserError(
            "the braces of its template do not match, or have more than a name between them; write "
            "{prompt} for a name, {{ and }} for braces that the teacher shall see"
        )
    return {match[1] for match in _FIELD.finditer(template) if match[1] is not None}


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """The template with `values` in the place of their names."""
    return _FIELD.sub(lambda match: match[0][0] if match[1] is None else values[match[1]], template)
