"""The report of some runs. Its content is built once, as blocks, for `report.html` and `report.md`.

It reads run directories and trains nothing.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, ValidationError

from rlad.comparison import report_columns as tables
from rlad.comparison import report_sentences as sentences
from rlad.comparison.comparable import Group, group_runs
from rlad.comparison.differences import draw_differences, problems_table, target_table
from rlad.comparison.figures import baseline_of, require_baseline, with_comparisons
from rlad.comparison.finished_runs import MissingRun, ReportedRun, Run, read_run
from rlad.comparison.imitation_map import FATES, imitation_maps
from rlad.comparison.paper_figures import write_figures
from rlad.comparison.report_plots import draw_plots
from rlad.comparison.verdict import verdict
from rlad.errors import UserError
from rlad.text import printable

HTML = "report.html"
MARKDOWN = "report.md"
RESULTS = "results.jsonl"
COMPARISON = "comparison.json"

_FORMATS = re.compile(r"([\\`*|~]|(?<!\w)_|_(?!\w)|^[#>]|^[+-](?!\d))")
"""Formatting characters; an underscore inside a word is not one."""
_ADDRESSES = re.compile(r"(?i)(:(?=//)|www(?=\.)|@(?=[^\s@]{0,255}\.\w))")
"""What GitHub turns into a link automatically, up to where it must be broken: https://, www. and
mail addresses."""
_BREAK = "<!-- -->"
"""Shows nothing. Unlike a backslash it also breaks the text for readers that search for addresses
after parsing."""


def write_report(
    runs: Sequence[ReportedRun],
    output: Path,
    *,
    missing: Sequence[MissingRun] = (),
    title: str = "Report",
    notes: Sequence[str] = (),
    baseline: str | None = None,
    figures: Path | None = None,
) -> Sequence[MissingRun]:
    """Write `report.html`, `report.md` and `results.jsonl` (a row per run) into the folder
    `output`. Returns the runs that the report lists as missing.

    Runs that cannot be compared are in separate tables. Unfinished or unreadable runs, and those in
    `missing`, are listed with the reason. `notes` say how a search on the validation split chose
    the learning rates. Vector figures and a LaTeX table are written to the folder `figures`. Raises
    `UserError` if no run has the method `baseline` (see `baseline_of`), or if the folder cannot be
    written.
    """
    read = [read_run(run) for run in runs]
    groups, doubles = group_runs([run for run in read if isinstance(run, Run)])
    missing = [*missing, *(run for run in read if isinstance(run, MissingRun)), *doubles]
    if baseline is not None:
        methods = [method for group in groups for method in group.methods]
        require_baseline(baseline, methods, missing)
    page = make_page(title, notes, groups, missing, baseline)
    rows = [
        run.to_json() | {"method": method.name, "table": number}
        for number, group in enumerate(groups, start=1)
        for method in group.methods
        for run in method.runs
    ]
    files = {
        HTML: render_html(page),
        MARKDOWN: _environment(autoescape=False).get_template("report.md.j2").render(page=page),
        RESULTS: "".join(json.dumps(row) + "\n" for row in rows),
    }
    write_files(output, files)
    for number, group in enumerate(groups if figures else (), start=1):
        assert figures is not None
        chosen = baseline_of(group.methods, baseline)
        folder = figures / f"table-{number}" if len(groups) > 1 else figures
        write_figures(with_comparisons(group.methods, chosen), chosen, folder)
    return missing


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write texts into a folder, which is made if missing. Raises `UserError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            # To a temporary file first: a file that a kill cut off could not be read.
            aside = folder / f".{name}.tmp"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, folder / name)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {folder} ({error.strerror}); choose another folder."
        ) from None


class ComparisonFile(BaseModel):
    """The content of `comparison.json`: the methods' names of the runs below it, how they were
    tuned, and what they are compared with."""

    model_config = ConfigDict(strict=True, frozen=True, use_attribute_docstrings=True)

    methods: dict[str, str]
    """folder below `runs` -> name of the method, in the order of the report"""
    notes: Sequence[str] = ()
    """how a search on the validation split chose the learning rates; empty without a search"""
    baseline: str | None = None


def read_comparison_file(root: Path) -> ComparisonFile | None:
    """Read `root/comparison.json`; None if there is no such file. Raises `UserError` if it cannot
    be read."""
    path = root / COMPARISON
    try:
        return ComparisonFile.model_validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError):
        raise UserError(
            f"{path} is not a file that a comparison has written; let `rlad compare` write it "
            "again, or delete it: then methods have the names of their folders."
        ) from None


# --- content --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the page. Its content is a text (for a heading or text), a `Table`, some `Plot`s,
    or the `MappedCompletion`s of an imitation map.

    `style` is the CSS class of a text (headline, warning or fine); `lead` is emphasised before it.
    """

    kind: Literal["h1", "h2", "h3", "text", "table", "plots", "completions"]
    content: Any
    style: str = ""
    lead: str = ""


def make_page(
    title: str,
    notes: Sequence[str],
    groups: Sequence[Group],
    missing: Sequence[MissingRun],
    baseline: str | None,
) -> list[Block]:
    """Build the report; its first block is the title."""
    sections = []
    for number, group in enumerate(groups, start=1):
        name = f"Table {number}" if len(groups) > 1 else ""
        sections.append(list(_section(name, group, baseline, is_tuned=bool(notes))))
    # The verdicts of all tables come first, so that they are read even if nothing else is.
    page = [Block("h1", title)]
    for number, group in enumerate(groups, start=1):
        name = f"Table {number}." if len(groups) > 1 else ""
        page += _verdict(name, group, baseline)
    if not groups:
        text = "No run came to its end, so there is nothing to compare."
        page.append(Block("text", text, "headline"))
    for text in sentences.not_comparable(groups):
        page.append(Block("text", text, "warning", lead="Not one comparison."))
    if missing:
        page += [Block("h2", "What is missing"), Block("table", tables.missing_table(missing))]
    for section in sections:
        page += section
    page.append(Block("h2", "How to read it"))
    return page + [Block("text", text) for text in (*notes, sentences.HOW_TO_READ)]


def _verdict(name: str, group: Group, chosen: str | None) -> Iterator[Block]:
    """Yield sentences on the result, its cost and what to do next."""
    baseline = baseline_of(group.methods, chosen)
    methods = with_comparisons(group.methods, baseline)
    for number, (lead, text) in enumerate(verdict(methods, baseline)):
        style = "" if number else "headline"
        yield Block("text", text, style, lead=lead or name)


def _section(name: str, group: Group, chosen: str | None, *, is_tuned: bool) -> Iterator[Block]:
    """Yield everything about one group of comparable runs except its verdict."""
    baseline = baseline_of(group.methods, chosen)
    methods = with_comparisons(group.methods, baseline)
    results, curves = draw_plots(methods)
    yield Block("h2", name or "Results")
    yield Block("text", sentences.what_is_shared(group))
    for text in sentences.warnings(methods, baseline, chosen):
        yield Block("text", text, "warning", lead="Warning.")
    yield Block("table", tables.results_table(methods, baseline.name))
    yield Block("plots", [results])
    yield Block("table", tables.breakdown_table(methods))
    if differences := draw_differences(methods, baseline):
        yield Block("plots", differences)
        yield Block("table", problems_table(methods, baseline))
    yield Block("text", sentences.splits(group, is_tuned=is_tuned), "fine")

    yield Block("h3", "Learning curves")
    yield Block("text", sentences.HOW_TO_READ_CURVES, "fine")
    yield Block("plots", curves)

    maps = imitation_maps(methods)
    if maps:
        yield Block("h3", "Imitation map: what TRRD did with each token")
        yield Block("text", sentences.HOW_TO_READ_MAP)
    for found in maps:
        yield Block("table", tables.phases_table(found))
        yield Block("completions", found.completions)

    yield Block("h3", "Cost")
    yield Block("table", tables.cost_table(methods))
    if target := target_table(methods, baseline):
        yield Block("table", target)
    for text in sentences.cost_notes(methods):
        yield Block("text", text, "fine")
    yield Block("h3", "Methods")
    yield Block("table", tables.methods_table(methods))


# --- forms ----------------------------------------------------------------------------------------


def render_html(page: Sequence[Block], refresh_seconds: int = 0) -> str:
    """Render a single file that loads nothing from outside, which the policy in its head also
    forbids. With `refresh_seconds` the browser reloads the page regularly."""
    environment = _environment(autoescape=True)
    assert environment.loader is not None
    style, script = (
        Markup(environment.loader.get_source(environment, name)[0])
        for name in ("style.css", "sort.js")
    )
    # The policy allows this one script, by its checksum.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        page=page,
        fates=FATES,
        style=style,
        script=script,
        script_digest=digest,
        refresh_seconds=refresh_seconds,
    )


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
    """Escape a text for Markdown, on one line: no formatting, HTML, links or table fields."""
    # Backslashes first, since what is added later must not be escaped again.
    line = _FORMATS.sub(r"\\\1", " ".join(printable(text).split()))
    line = re.sub(r"\](?=[(:\[])", r"]\\", line)
    line = re.sub(r"<(?! )", "&lt;", line.replace("&", "&amp;"))
    return _ADDRESSES.sub(rf"\1{_BREAK}", line)
