"""Text from models, files and paths, made harmless in Markdown."""

import re

from rlad.text import printable

_FORMATS = re.compile(r"([\\`*|~]|(?<!\w)_|_(?!\w)|^[#>]|^[+-](?!\d))")
"""characters that format; an underscore inside a word does not"""
_ADDRESSES = re.compile(r"(?i)(:(?=//)|www(?=\.)|@(?=[^\s@]{0,255}\.\w))")
"""what GitHub makes a link of without being asked, up to where it must be broken: https://, www.
and mail addresses"""
_BREAK = "<!-- -->"
"""shows nothing; unlike a backslash it also parts the text for those that look for addresses after
the parser"""


def markdown(text: str) -> str:
    """Escape a text so that it means nothing but itself in Markdown, on one line: no formatting,
    HTML, links or table fields."""
    line = _FORMATS.sub(r"\\\1", " ".join(printable(text).split()))
    line = re.sub(r"\](?=[(:\[])", r"]\\", line)
    line = re.sub(r"<(?! )", "&lt;", line.replace("&", "&amp;"))
    return _ADDRESSES.sub(rf"\1{_BREAK}", line)
