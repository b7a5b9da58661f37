"""The wheel and the source archive hold what an installation outside of the clone needs."""

import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import rlad

pytest.importorskip("hatchling", reason="builds the package: pip install hatchling")

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "rlad"


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(tmp_path):
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}

    files = [p for p in SOURCE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert found == {str(path.relative_to(SOURCE.parent)) for path in files}
    assert {"rlad/py.typed", "rlad/embedded/student/model.safetensors"} <= found
    assert {"rlad/comparison/templates/report.html.j2", "rlad/embedded/run.toml"} <= found
    assert "licenses/LICENSE" in about
    assert Path(wheel).name == f"rlad-{rlad.__version__}-py3-none-any.whl"
    assert Path(wheel).stat().st_size < 10e6


def test_the_source_archive_can_be_built_and_tested(tmp_path):
    (archive,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(archive) as tar:
        found = {name.partition("/")[2] for name in tar.getnames()}

    expected = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "src/rlad/py.typed")
    assert {*expected, "tests/conftest.py", "recipes/paper/README.md", "CITATION.cff"} <= found
    assert not [name for name in found if name.startswith((".venv", "runs/", "dist/", ".git/"))]


def test_the_version_is_written_once():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert table["project"]["dynamic"] == ["version"] and "version" not in table["project"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited[1] == rlad.__version__
