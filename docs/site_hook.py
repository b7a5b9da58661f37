"""Pages of the site from outside `docs/`: the README is the home page, and each linked file a page.

So one relative link works on GitHub and on the site.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = "repository/"  # the folder of the site for the repository's other files
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)(?P<path>[^)\s#]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add README.md, what the navigation names, and all that these and the pages link."""
    waiting = [
        "README.md",
        *_named(config.nav),
        *(_in_repository(file.src_uri) for file in files.documentation_pages()),
    ]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.startswith("docs/"):
            files.append(File.generated(config, _on_site(path), content=_as_markdown(path)))
        if path.endswith(".md"):
            waiting += _linked(path, (ROOT / path).read_text(encoding="utf-8"))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = _in_repository(page.file.src_uri)
    if not here.endswith(".md"):
        return markdown

    def on_site(link: re.Match[str]) -> str:
        target = _target(here, link["path"])
        return (
            relpath(_on_site(target), PurePosixPath(page.file.src_uri).parent)
            if target
            else link["path"]
        )

    return LINK.sub(on_site, markdown)


def _named(nav: object) -> Iterator[str]:
    """Yield the files outside `docs/` that the navigation names."""
    if isinstance(nav, str) and nav.startswith(OUTSIDE):
        yield _in_repository(nav)
    elif isinstance(nav, dict | list):
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(part)


def _linked(here: str, markdown: str) -> list[str]:
    return [target for link in LINK.finditer(markdown) if (target := _target(here, link["path"]))]


def _target(here: str, link: str) -> str | None:
    """Return the repository's file that a link in the file `here` leads to, if there is one."""
    path = normpath(PurePosixPath(here).parent / link)
    return path if (ROOT / path).is_file() and not path.startswith("..") else None


def _on_site(path: str) -> str:
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return OUTSIDE + (path if path.endswith(".md") else f"{path}.md")


def _in_repository(src_uri: str) -> str:
    """Reverse `_on_site`."""
    if src_uri == "index.md":
        return "README.md"
    if not src_uri.startswith(OUTSIDE):
        return f"docs/{src_uri}"
    path = src_uri.removeprefix(OUTSIDE)
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def _as_markdown(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sbatch": "bash"}.get(
        PurePosixPath(path).suffix, "text"
    )
    return f"# `{path}`\n\n``````{language}\n{text}\n``````\n"
