"""Templates with `{names}`. The texts that fill them are unchecked, so braces in a text have no
meaning. Imports no torch."""

import re
from collections.abc import Mapping

from rlad.errors import UserError

# `{{` or `}}` for a brace itself, or a name between braces.
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}!:]*)\}")


def template_names(template: str) -> set[str]:
    """Return the names in a template. Raises `UserError` for an unmatched brace, and for a format
    or conversion after a name."""
    if re.search("[{}]", _FIELD.sub("", template)):
        raise UserError(
            "the braces of its template do not match, or have more than a name between them; write "
            "{prompt} for a name, {{ and }} for braces that the teacher should see"
        )
    return {match[1] for match in _FIELD.finditer(template) if match[1] is not None}


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Return the template with each name replaced by its value."""
    return _FIELD.sub(lambda match: match[0][0] if match[1] is None else values[match[1]], template)
