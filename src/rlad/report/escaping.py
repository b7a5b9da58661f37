"""Text from models, files and paths, made harmless."""

import re

_FORMATS = re.compile(r"([\\`*|~]|(?<!\w)_|_(?!\w)|^[#>]|^[+-](?!\d))")
"""characters that format; an underscore inside a word does not"""
_ADDRESSES = re.compile(r"(?i)(:(?=//)|www(?=\.)|@(?=\S*\.\w))")
"""what GitHub makes a link of without being asked, up to where it must be broken: https://, www. and mail addresses"""
_BREAK = "<!-- -->"
"""shows nothing; unlike a backslash it also parts the text for those that look for addresses behind the parser"""


def clean(text: str) -> str:
    """Text from a model or a file without characters that cannot be seen, such as those that turn the reading direction."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def markdown(text: str) -> str:
    """Text that means nothing but itself in Markdown, on one line: no formatting, HTML, links or table fields."""
    line = _FORMATS.sub(r"\\\1", " ".join(clean(text).split()))
    line = re.sub(r"\](?=[(:\[])", r"]\\", line)
    line = re.sub(r"<(?! )", "&lt;", line.replace("&", "&amp;"))
    return _ADDRESSES.sub(rf"\1{_BREAK}", line)
