"""A report of hostile texts in a real browser: they are shown, and nothing of them is run, loaded
or clicked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browsers import asked_for, opened
from report_runs import sample_row, write_run
from rlad.comparison.finished_runs import MissingRun, ReportedRun
from rlad.comparison.report import write_report

pytestmark = pytest.mark.browser

TAKEN = "document.title='taken'"
INJECTIONS = (
    f"<script>{TAKEN}</script>",
    f"</script><script>{TAKEN}</script>",
    f"</style><script>{TAKEN}</script>",
    f"</title><script>{TAKEN}</script>",
    f"</svg><script>{TAKEN}</script>",
    f"]]><script>{TAKEN}</script>",
    f"--><script>{TAKEN}</script>",
    f'<img src=x onerror="{TAKEN}">',
    f'<svg onload="{TAKEN}"><animate onbegin="{TAKEN}"/></svg>',
    f'" autofocus onfocus="{TAKEN}" x="',
    f"' onmouseover='{TAKEN}' x='",
    f'<a href="javascript:{TAKEN}">x</a>',
    '<link rel="stylesheet" href="http://127.0.0.1:9/x.css"><meta http-equiv="refresh" content="0;url=http://127.0.0.1:9/">',
    "<iframe src='http://127.0.0.1:9/'></iframe><form "
    "action='http://127.0.0.1:9/'><button>x</button></form>",
    "<base href='http://127.0.0.1:9/'>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31m\u202e\u2066\x00\ud800",
    "$\\frac{1}{2}$ & < > ' \"",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every text in every place that takes one: prompt, token, verdict, model, method, title, note,
    reason."""
    root = tmp_path_factory.mktemp("report")
    runs = []
    for i, evil in enumerate(INJECTIONS):
        tokens = [" Ada", evil, "\n" + evil]
        row = sample_row(1, tokens, "+h+", verdict=evil) | {"prompt": evil}
        model = evil.replace("\ud800", "").replace("\x00", "")
        run = write_run(
            root / str(i),
            correct=[1, 2],
            keys=[evil, "key"],
            samples=[row],
            student={"model": model},
            teacher={"model": model},
        )
        runs.append(ReportedRun(f"method {i} {evil}", run))
    missing = [MissingRun(evil, 0, evil) for evil in INJECTIONS]
    write_report(
        runs,
        root / "out",
        missing=missing,
        title=f"Report {' '.join(INJECTIONS)}",
        notes=INJECTIONS,
    )
    return root / "out" / "report.html"


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    with opened(page.as_uri()) as driver:
        yield driver


def test_nothing_is_run_or_loaded(browser, page):
    assert browser.title.startswith("Report <script>")
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    assert asked_for(browser) == [page.as_uri()] and browser.current_url == page.as_uri()


def test_only_our_own_elements_are_there(browser):
    """One script and one style; no element that loads or sends something, no attribute that runs
    something."""
    assert browser.execute_script("return document.scripts.length") == 1
    for tag in (
        "img:not([src^='data:image/svg+xml;base64,'])",
        "iframe",
        "a",
        "form",
        "base",
        "link",
        "object",
        "embed",
        "animate",
        "foreignObject",
        "svg",
    ):
        assert (
            browser.execute_script("return document.querySelectorAll(arguments[0]).length", tag)
            == 0
        ), tag
    names = "return [...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert [
        name
        for name in browser.execute_script(names)
        if name.startswith("on") or name == "autofocus"
    ] == []
    assert (
        browser.execute_script(
            "return document.querySelectorAll('meta[http-equiv=refresh]').length"
        )
        == 0
    )


def test_what_was_written_is_shown(browser):
    """As text, letter by letter, but for what steers."""
    shown = browser.execute_script("return document.body.textContent")
    for evil in INJECTIONS[:-2]:
        assert shown.count(evil) >= 4, evil
    assert not any(c in shown for c in "\x1b\u202e\u2066\x00")


def test_sorting_and_pointing_run_nothing_either(browser):
    for button in browser.find_elements("css selector", "table.sortable thead button")[:12]:
        button.click()
    actions = browser.execute_script(
        "for (const e of document.querySelectorAll('*')) e.dispatchEvent(new "
        "MouseEvent('mouseover'))"
    )
    assert actions is None and browser.title.startswith("Report <script>")
