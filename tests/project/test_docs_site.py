"""The documentation site: no dead link, every page opens offline and fits on a telephone."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra `docs`)")
from browsers import asked_for, opened

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.browser
WIDTH = 400  # pixels
NOT_RENDERED = """
const all = selector => [...document.querySelectorAll(selector)];
return [all('article p, article li').filter(e => !e.querySelector('li')).map(e => e.textContent),
        all('article *').filter(e => e instanceof HTMLUnknownElement).map(e => e.outerHTML)]
"""
BARE_MARKS = re.compile(
    r"^\s*(?:[-*] |1\. )|^\|.*\||\]\(|```|^:::", re.MULTILINE
)  # where the site reads Markdown otherwise than GitHub


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(config),
        "-d",
        str(site),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    with opened(address) as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(site: Path) -> list[str]:
    return sorted(str(page.parent.relative_to(site)) + "/" for page in site.rglob("index.html"))


def test_every_page_of_docs_and_every_recipe_is_in_the_site(pages):
    written = {
        path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")
    }
    assert {f"{path}/" for path in written if path.name != "index"} <= set(pages)
    recipes = {
        path.parent.relative_to(ROOT) for path in (ROOT / "recipes").rglob("README.md")
    }  # linked from docs/recipes.md
    assert {f"repository/{path}/" for path in recipes} <= set(pages)
    assert "repository/src/rlad/objectives/trrd.py/" in pages  # linked from README.md


def test_every_page_of_docs_is_once_in_the_navigation():
    _, navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")
    named = re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(name for name in named if not name.startswith("repository/")) == sorted(
        pages | {"index.md"}
    )


def test_every_page_opens_offline_and_is_readable_on_a_telephone(browser, address, pages):
    size = {"width": WIDTH, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for page in pages:
        browser.get(address + page)
        assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == [], (
            page
        )  # a 404 is one
        asked = [url for url in asked_for(browser) if not url.startswith("data:")]
        assert all(url.startswith(address) for url in asked), (page, asked)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= WIDTH, page
        bare, unknown = browser.execute_script(NOT_RENDERED)
        assert [text for text in bare if BARE_MARKS.search(text)] == [] and unknown == [], page


def test_colours_follow_the_system_and_the_picture_is_there(browser, address):
    for scheme, name in (("dark", "slate"), ("light", "default"), ("dark", "slate")):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        browser.get(address + "concepts/")
        assert browser.execute_script("return document.body.dataset.mdColorScheme") == name
        assert (
            browser.execute_script("return document.querySelector('article img').naturalWidth") > 0
        )


def test_each_dead_link_fails_the_build(tmp_path):
    for path in ROOT.iterdir():
        if path.name != "docs" and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    dead = ["nowhere.md", "methods.md#nowhere", "../recipes/nowhere.md"]
    with (tmp_path / "docs/check.md").open("a", encoding="utf-8") as page:
        page.write("".join(f"\n[dead]({link})\n" for link in dead))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert done.returncode == 1
    assert all(any(link in line for line in warnings) for link in dead), done.stderr
