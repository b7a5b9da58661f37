"""The docs name only what is there: files, tests, modules, settings and commands."""

import importlib
import inspect
import re
import shlex
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from rlad.cli.main import main
from rlad.config import comparison, context, objective, run, task, teacher, template
from rlad.config.catalogue import CONFIGS, names
from rlad.config.objective import OBJECTIVE_CONFIGS
from rlad.engines.verl.objective import NAMES
from rlad.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "recipes").rglob("README.md"),
    ]
)
FOLDERS = ("src", "docs", "tests", "benchmarks", "recipes", "examples", ".ci")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_TRL = [name for name, one in OBJECTIVE_CONFIGS.items() if "trl" in one.engines]
FREE_NAMES = {"logic", "sums", "gsm8k", "aime2025", "methods", "enable_thinking"}
"""Keys of tables that a user names."""
TRL_NAMES = {"per_device_train_batch_size", "fsdp", "fsdp_config", "fsdp_version", "use_vllm"}
TRL_NAMES |= {"vllm_mode", "teacher_is_sharded"}
"""Of [engine.trl], whose names are TRL's."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def spans(page: Path) -> list[str]:
    """Return what the page has between backticks, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


def blocks(page: Path, *languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [block for language, block in FENCE.findall(text) if language in languages]


def setting_names() -> set[str]:
    """Return the names of all fields of all sections of runs and comparisons."""
    modules = (comparison, context, objective, run, task, teacher, template)
    sections = [
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, BaseModel)
    ]
    return {field for section in sections for field in section.model_fields}


def keys(table: Any) -> Iterator[str]:
    if isinstance(table, dict):
        for key, value in table.items():
            yield key
            yield from keys(value)


SETTINGS = setting_names()
TEST_SOURCES = "\n".join(
    [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    + [path.stem for path in (ROOT / "tests").rglob("*.py")]
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_tests_are_there(page: Path) -> None:
    named = [word for text in [*spans(page), *blocks(page, "bash", "")] for word in text.split()]
    missing = []
    for word in named:
        path = word.strip("\"'(),;").rstrip("/")
        if re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./-]+", path):
            missing += [path] if not (ROOT / path).exists() else []
        elif re.fullmatch(r"[a-z_]+/[\w/]+\.py", path) and "NAME" not in path:
            missing += [path] if not (ROOT / "src" / "rlad" / path).exists() else []
        for test in re.findall(r"\btest_\w+", path):
            missing += [test] if not re.search(rf"\b{test}\b", TEST_SOURCES) else []
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_are_there(page: Path) -> None:
    for name in re.findall(r"\brlad(?:\.\w+)+", page.read_text(encoding="utf-8")):
        owner: Any = importlib.import_module("rlad")
        module = "rlad"
        for part in name.split(".")[1:]:
            try:
                owner = importlib.import_module(module := f"{module}.{part}")
            except ModuleNotFoundError as error:
                if error.name is not None and not error.name.startswith("rlad"):
                    break  # an optional package is not installed
                owner = getattr(owner, part)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_are_there(page: Path) -> None:
    sections = "|".join(run.RunConfig.model_fields)
    quoted = [
        part
        for span in spans(page)
        for path in re.findall(rf"^((?:{sections})\.[a-z_.]+[a-z])(?:$|[ =])", span)
        for part in path.split(".")
    ]
    tables = [key for block in blocks(page, "toml") for key in keys(tomllib.loads(block))]
    unknown = {key for key in [*quoted, *tables] if key not in SETTINGS | FREE_NAMES | TRL_NAMES}
    assert {key for key in unknown if " " not in key} - set(names("objectives")) == set()


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words after `rlad` of each of its commands on the page."""
    lines = "\n".join(blocks(page, "bash", "")).replace("\\\n", " ").splitlines()
    for text in [*lines, *spans(page)]:
        command = re.search(r"(?:^|&& |; do |; )rlad ([a-z][^;&|]*)", text)
        if command and "..." not in text:
            yield shlex.split(command[1], comments=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_can_be_typed(page: Path) -> None:
    for words in commands(page):
        verb: Any = main
        while isinstance(verb, click.Group) and words:
            assert words[0] in verb.commands, words
            verb = verb.commands[words[0]]
            words = words[1:]
        overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
        unknown = [
            part
            for override in overrides
            for part in override.partition("=")[0].split(".")
            if part not in SETTINGS
        ]
        assert unknown == [], words
        if not isinstance(verb, click.Group):
            words = words or (
                ["RUN"] if verb.name in ("doctor", "evaluate", "report", "watch", "chat") else []
            )
            if verb.name not in ("model", "list", "serve-teacher") or words:
                verb.make_context("rlad", list(words))


@pytest.mark.parametrize("name", CONFIGS["objectives"])
def test_the_readme_names_the_paper_of_each_method(name: str) -> None:
    rows = re.findall(rf"^\| \[`{name}`\].*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 1
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", names("objectives")[name])
    assert papers and all(f"https://arxiv.org/abs/{paper}" in rows[0] for paper in papers)


@pytest.mark.parametrize("what", ["teachers", "tasks"])
def test_a_page_lists_each_kind(what: str) -> None:
    table = "\n".join(
        line
        for line in (ROOT / "docs" / f"{what}.md").read_text().splitlines()
        if line.startswith("| ")
    )
    assert [name for name in CONFIGS[what] if f"`{name}`" not in table] == []


@pytest.mark.parametrize("what", CONFIGS)
def test_the_reference_shows_each_section(what: str) -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert [
        one for one in CONFIGS[what].values() if not re.search(rf"\b{one.__name__}\b", page)
    ] == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_reference_shows_each_function(name: str) -> None:
    _, _, section = (
        (ROOT / "docs" / "reference" / "objectives.md").read_text().partition(f"\n## `{name}`\n")
    )
    assert re.search(rf"members: \[.*\b{name}_loss\]", section.partition("\n## ")[0])


@pytest.mark.parametrize(
    ("page", "line", "able"),
    [
        ("trl.md", r"\| `objective` \|.*", WITH_TRL),
        ("verl.md", r"gives verl the objectives .*", NAMES),
    ],
)
def test_the_page_of_an_engine_names_its_objectives(
    page: str, line: str, able: Collection[str]
) -> None:
    found = re.search(line, (ROOT / "docs" / page).read_text())
    assert found and set(able) <= set(re.findall(r"`(\w+)`", found[0]))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_of_scripts_are_in_their_sources(page: Path) -> None:
    lines = "\n".join(blocks(page, "bash", "")).replace("\\\n", " ").splitlines()
    unknown = []
    for text in [*lines, *spans(page)]:
        for script, words in re.findall(r"python ((?:benchmarks|recipes)/\S+\.py)([^#;|]*)", text):
            source = (ROOT / script).read_text(encoding="utf-8")
            unknown += [
                (script, option)
                for option in re.findall(r"--([a-z-]+)", words)
                if option not in source and option.replace("-", "_") not in source
            ]
    assert unknown == []
