"""From figures to `report.html` and `report.md`."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rlad.comparison import plots, tables, words
from rlad.comparison.comparable import Group
from rlad.comparison.escaping import markdown
from rlad.comparison.imitation_map import FATES, ImitationMap, imitation_maps
from rlad.comparison.methods import baseline_of, figures_of
from rlad.comparison.runs import MissingRun
from rlad.text import printable


@dataclass(frozen=True)
class Section:
    """Everything about one group of comparable runs."""

    headline: str
    shared: str
    splits: str
    warnings: Sequence[str]
    tables: dict[str, tables.Table]
    results: plots.Plot
    legend: plots.Plot
    curves: Sequence[plots.Plot]
    cost: plots.Plot
    cost_notes: Sequence[str]
    maps: Sequence[ImitationMap]


@dataclass(frozen=True)
class Page:
    """What both forms of the report show."""

    title: str
    notes: Sequence[str]
    sections: Sequence[Section]
    not_comparable: Sequence[str]
    missing: tables.Table | None


def make_page(
    title: str,
    notes: Sequence[str],
    groups: Sequence[Group],
    missing: Sequence[MissingRun],
    baseline: str | None,
) -> Page:
    sections = [_section(group, baseline, is_tuned=bool(notes)) for group in groups]
    missed = tables.missing_table(missing) if missing else None
    return Page(title, notes, sections, words.not_comparable(groups), missed)


def _section(group: Group, chosen: str | None, *, is_tuned: bool) -> Section:
    figures, baseline = figures_of(group, chosen), baseline_of(group, chosen)
    shown = [tables.results_table(figures, baseline.name), tables.breakdown_table(figures)]
    shown += [tables.cost_table(figures), tables.methods_table(figures)]
    passed = plots.draw_pass_at_k(figures)
    return Section(
        headline=words.headline(figures, baseline.name),
        shared=words.what_is_shared(group),
        splits=words.splits(group, is_tuned=is_tuned),
        warnings=words.warnings(figures, baseline, chosen),
        tables={table.name: table for table in shown},
        results=plots.draw_results(figures),
        legend=plots.legend(figures),
        curves=[*plots.draw_curves(figures), *([passed] if passed else [])],
        cost=plots.draw_cost(figures),
        cost_notes=words.cost_notes(figures),
        maps=imitation_maps(group),
    )


def render_html(page: Page) -> str:
    """One file without anything from outside; the policy in its head forbids the browser to load
    any."""
    environment = _environment(autoescape=True)
    source = environment.loader
    assert source is not None
    style, script = (
        Markup(source.get_source(environment, name)[0]) for name in ("style.css", "sort.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("report.html.j2")
    return template.render(
        page=page, fates=FATES, style=style, script=script, script_digest=digest, svg=Markup
    )


def render_markdown(page: Page) -> str:
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
