"""`rlad.train` in a real Jupyter kernel: it trains, its progress shows, and its result is a
picture."""

import base64
import importlib.util
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlad.runs.curve import curve_html
from rlad.runs.directory import RunDirectory

EXAMPLE = Path(__file__).parents[2] / "examples" / "03_notebook.ipynb"
NEEDED = ("nbclient", "ipykernel", "ipywidgets")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Any:
    """The example, run in a kernel of this environment."""
    if MISSING:
        pytest.skip(f"optional packages are not installed: {', '.join(MISSING)}")
    import nbclient
    import nbformat

    notebook: Any = nbformat.read(EXAMPLE, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    return client.execute(), folder


def picture_in(html: str) -> Image.Image:
    [source] = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]+)"', html)
    return Image.open(BytesIO(base64.b64decode(source)))


@pytest.mark.notebook
def test_the_result_shows_figures_and_the_learning_curve(executed):
    notebook, folder = executed
    [output] = [each for each in notebook.cells[2].outputs if each.output_type == "execute_result"]
    html = output.data["text/html"]
    assert "test pass@1 before" in html and "test pass@1 after" in html
    drawn = picture_in(html)
    assert drawn.size == (1320, 432) and np.asarray(drawn.convert("L")).std() > 10
    assert drawn.tobytes() == Image.open(folder / "runs" / "notebook" / "curve.png").tobytes()
    assert len(list(RunDirectory(folder / "runs" / "notebook").read("metrics.jsonl"))) == 4


@pytest.mark.notebook
def test_the_progress_bar_is_a_widget_that_ends_complete(executed):
    notebook, _ = executed
    outputs = notebook.cells[1].outputs
    [view] = [
        each.data["application/vnd.jupyter.widget-view+json"]
        for each in outputs
        if "widget" in str(each.get("data"))
    ]
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    shown = widgets[view["model_id"]]["state"]["outputs"]
    assert len(shown) == 1, "the widget shows the bar as it is now, not all that it was"
    assert "4/4" in shown[0]["data"]["text/plain"] and "reward" in shown[0]["data"]["text/plain"]
    lines = "".join(
        each.data["text/plain"]
        for each in outputs
        if each.output_type == "display_data" and each.data
    )
    for line in ("step 0  test pass@1", "step 2  validation pass@1", "step 4  test pass@1"):
        assert line in lines
    assert not any(each.output_type == "error" or each.get("name") == "stderr" for each in outputs)
    assert re.search(r"(correct|wrong) \|", notebook.cells[3].outputs[0].text)


def test_html_of_a_run_without_a_curve_escapes_what_it_shows(tmp_path):
    run = RunDirectory(tmp_path)
    assert (
        curve_html(run, {"run directory": "<b>&"})
        == "<table><tr><td>run directory</td><td>&lt;b&gt;&amp;</td></tr></table>"
    )
    picture = BytesIO()
    Image.new("RGB", (3, 2)).save(picture, "png")
    (tmp_path / "curve.png").write_bytes(picture.getvalue())
    assert picture_in(curve_html(run, {})).size == (3, 2)
