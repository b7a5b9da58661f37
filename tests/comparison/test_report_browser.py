"""The report in a real browser: it opens offline without errors, its tables sort, and it is
readable in the dark."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browsers import asked_for, opened
from report_runs import sample_row, write_run
from rlad.comparison.finished_runs import MissingRun, ReportedRun
from rlad.comparison.report import write_report

pytestmark = pytest.mark.browser
EVIL = "<script>document.title = 'taken'</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods whose order by name, by pass@1 and by text differ: 100 % stands above 25 %, not
    below."""
    root = tmp_path_factory.mktemp("report")
    correct = {"grpo": [1, 1, 1, 1], "kdrl": [4, 4, 4, 4], "trrd": [2, 2, 2, 4]}
    samples = [
        sample_row(step, [" Ada", " is", EVIL, ".\n"], "+h++", clamped=".c..") for step in (1, 2, 4)
    ]
    runs = [
        ReportedRun(
            m,
            write_run(
                root / m / str(seed), correct=c, objective=m, seed=seed, samples=samples, ood=[0, 1]
            ),
        )
        for m, c in correct.items()
        for seed in (0, 1, 2)
    ]
    write_report(runs, root / "out", missing=[MissingRun("opd", 0, EVIL)], title="Report <b>")
    return root / "out" / "report.html"


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    with opened(page.as_uri()) as driver:
        yield driver


def column(browser: Any, table: int, name: str) -> list[str]:
    """The row names of a table after a click on the head of a column."""
    chosen = browser.find_elements("css selector", "table.sortable")[table]
    button = next(
        b
        for b in chosen.find_elements("css selector", "thead button")
        if b.text.split("\n")[0].strip() == name
    )
    button.click()
    return [head.text for head in chosen.find_elements("css selector", "tbody th")]


def test_it_opens_without_errors_and_asks_for_nothing_else(browser, page):
    assert browser.title == "Report <b>"
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    assert asked_for(browser) == [page.as_uri()]


def test_columns_sort_by_number_both_ways_and_by_text(browser):
    results = 1  # the first table says what is missing
    assert column(browser, results, "after") == ["kdrl", "trrd", "grpo"]
    assert (
        browser.find_element("css selector", "th[aria-sort]").get_attribute("aria-sort")
        == "descending"
    )
    assert column(browser, results, "after") == ["grpo", "trrd", "kdrl"]
    assert (
        browser.find_element("css selector", "th[aria-sort]").get_attribute("aria-sort")
        == "ascending"
    )
    assert column(browser, results, "p")[-1] == "grpo"  # the baseline has none
    assert column(browser, results, "p")[-1] == "grpo"
    assert column(browser, results, "method") == ["grpo", "kdrl", "trrd"]
    assert column(browser, results, "method") == ["trrd", "kdrl", "grpo"]


def test_a_head_sorts_by_keyboard(browser):
    button = browser.find_elements("css selector", "table.sortable")[1].find_elements(
        "css selector", "thead button"
    )[2]
    button.send_keys("\ue007")
    assert browser.find_element("css selector", "th[aria-sort]").text.startswith("before")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, tmp_path, scheme):
    """Contrast of at least 4.5 (WCAG AA) for text, for plots' labels and for each kind of token."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    paper = luminance(browser, "document.body", "backgroundColor")
    assert (paper > 0.9) if scheme == "light" else (paper < 0.05)
    filter_of_plots = "return getComputedStyle(document.querySelector('figure img')).filter"
    assert ("invert" in browser.execute_script(filter_of_plots)) == (scheme == "dark")
    for selector in ("h1", "td", "small", "figcaption"):
        assert (
            contrast(luminance(browser, f"document.querySelector('{selector}')", "color"), paper)
            >= 4.5
        ), selector
    for kind in ("reinforced", "held", "punished", "protected"):
        token = f"document.querySelector('dl .{kind}')"
        assert (
            contrast(
                luminance(browser, token, "color"), luminance(browser, token, "backgroundColor")
            )
            >= 4.5
        ), kind
    picture = base64.b64decode(browser.get_screenshot_as_base64())
    (tmp_path / f"{scheme}.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_a_narrow_window_scrolls_tables_not_the_page(browser):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_tokens_are_shown_with_their_fate(browser):
    tokens = browser.find_elements("css selector", ".tokens")[0].find_elements(
        "css selector", "span"
    )
    assert [token.get_attribute("class") for token in tokens] == [
        "reinforced",
        "held clamped",
        "reinforced",
        "reinforced",
    ]
    assert (
        tokens[1].get_attribute("title")
        == "held back; log student - log teacher +0.50, clamped; advantage +1.00"
    )
    assert tokens[2].text == EVIL and tokens[3].get_attribute("textContent") == ".⏎\n"


def luminance(browser: Any, element: str, what: str) -> float:
    """Relative luminance (WCAG) of a computed colour."""
    text = browser.execute_script(f"return getComputedStyle({element}).{what}")
    channels = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
