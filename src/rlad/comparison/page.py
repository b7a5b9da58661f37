"""The content of a report, once for `report.html` and `report.md`."""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlad.comparison import tables, words
from rlad.comparison.comparable import Group
from rlad.comparison.imitation_map import FATES, MappedCompletion, imitation_maps
from rlad.comparison.methods import baseline_of, figures_of
from rlad.comparison.plots import Plot, draw_plots
from rlad.comparison.runs import MissingRun
from rlad.text import printable

_FORMATS = re.compile(r"([\\`*|~]|(?<!\w)_|_(?!\w)|^[#>]|^[+-](?!\d))")
"""characters that format; an underscore inside a word does not"""
_ADDRESSES = re.compile(r"(?i)(:(?=//)|www(?=\.)|@(?=[^\s@]{0,255}\.\w))")
"""what GitHub makes a link of without being asked, up to where it must be broken: https://, www.
and mail addresses"""
_BREAK = "<!-- -->"
"""shows nothing; unlike a backslash it also parts the text for those that look for addresses after
the parser"""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading; level 1 is the title of the page."""

    kind: ClassVar = "heading"
    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph. `style` is a CSS class: headline, warning or fine; `lead` stands out before the
    text."""

    kind: ClassVar = "paragraph"
    text: str
    style: str = ""
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Plots:
    """The plots of a place; Markdown says in words what can be read from them."""

    kind: ClassVar = "plots"
    plots: Sequence[Plot]


@dataclass(frozen=True, slots=True)
class Completions:
    """The completions of an imitation map; Markdown leaves them out."""

    kind: ClassVar = "completions"
    completions: Sequence[MappedCompletion]


Block = Heading | Text | tables.Table | Plots | Completions


def make_page(
    title: str,
    notes: Sequence[str],
    groups: Sequence[Group],
    missing: Sequence[MissingRun],
    baseline: str | None,
) -> list[Block]:
    """Put the report together; its first block is the title."""
    names = [f"Table {i}" if len(groups) > 1 else "" for i in range(1, len(groups) + 1)]
    sections = [
        list(_section(name, group, baseline, is_tuned=bool(notes)))
        for name, group in zip(names, groups, strict=True)
    ]
    # The headlines of all tables first: whoever reads no further knows the result.
    page: list[Block] = [Heading(title, level=1)]
    page += [section.pop(0) for section in sections]
    if not groups:
        text = "No run came to its end, so there is nothing to compare."
        page.append(Text(text, "headline"))
    for text in words.not_comparable(groups):
        page.append(Text(text, "warning", lead="Not one comparison."))
    if missing:
        page += [Heading("What is missing"), tables.missing_table(missing)]
    for section in sections:
        page += section
    page += [Heading("How to read it"), *map(Text, notes), Text(words.HOW_TO_READ)]
    return page


def _section(name: str, group: Group, chosen: str | None, *, is_tuned: bool) -> Iterator[Block]:
    """Show everything about one group of comparable runs; its headline comes first."""
    baseline = baseline_of(group, chosen)
    figures = figures_of(group, chosen)
    plots = draw_plots(figures)
    headline = words.headline(figures, baseline.name)
    yield Text(headline, "headline", lead=f"{name}." if name else "")

    yield Heading(name or "Results")
    yield Text(words.what_is_shared(group))
    for text in words.warnings(figures, baseline, chosen):
        yield Text(text, "warning", lead="Warning.")
    yield tables.results_table(figures, baseline.name)
    yield Plots(plots["results"])
    yield tables.breakdown_table(figures)
    yield Text(words.splits(group, is_tuned=is_tuned), "fine")

    yield Heading("Learning curves", level=3)
    yield Text(words.HOW_TO_READ_CURVES, "fine")
    yield Plots(plots["curves"])

    maps = imitation_maps(group)
    if maps:
        yield Heading("Imitation map: what TRRD did with each token", level=3)
        yield Text(words.HOW_TO_READ_MAP)
    for found in maps:
        yield tables.phases_table(found)
        yield Completions(found.completions)

    yield Heading("Cost", level=3)
    yield Plots(plots["cost"])
    yield tables.cost_table(figures)
    for text in words.cost_notes(figures):
        yield Text(text, "fine")
    yield Heading("Methods", level=3)
    yield tables.methods_table(figures)


def render_html(page: Sequence[Block]) -> str:
    """Render one file without anything from outside; the policy in its head forbids the browser to
    load any."""
    environment = _environment(autoescape=True)
    assert environment.loader is not None
    style, script = (
        Markup(environment.loader.get_source(environment, name)[0])
        for name in ("style.css", "sort.js")
    )
    # The policy allows this one script, by its checksum.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        page=page, fates=FATES, style=style, script=script, script_digest=digest
    )


def render_markdown(page: Sequence[Block]) -> str:
    return _environment(autoescape=False).get_template("report.md.j2").render(page=page)


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("rlad.comparison"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["markdown"] = markdown
    return environment


def markdown(text: str) -> str:
    """Escape a text so that it means nothing but itself in Markdown, on one line: no formatting,
    HTML, links or table fields."""
    # In this order: backslashes first, as what is added afterwards must not be escaped again.
    line = _FORMATS.sub(r"\\\1", " ".join(printable(text).split()))
    line = re.sub(r"\](?=[(:\[])", r"]\\", line)
    line = re.sub(r"<(?! )", "&lt;", line.replace("&", "&amp;"))
    return _ADDRESSES.sub(rf"\1{_BREAK}", line)
