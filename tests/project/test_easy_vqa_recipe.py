"""The problems and the student that `recipes/easy-vqa-tiny/make.py` makes."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.easy_vqa
pytest.importorskip("easy_vqa", reason="needs the optional package easy-vqa")

from loaded_scripts import load_script
from rlad.models.loading import load_language_model
from rlad.rollouts.sampling import sample
from rlad.tasks import make_task

SCRIPT = Path(__file__).parents[2] / "recipes" / "easy-vqa-tiny" / "make.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder that a run of its --smoke has left, and what it printed."""
    module: Any = load_script(SCRIPT)
    folder = tmp_path_factory.mktemp("easy-vqa")
    lines = []
    module.print = lambda text, **flush: lines.append(text)
    module.main(["--out", str(folder), "--smoke"])
    yield folder, "\n".join(lines)
    sys.path.remove(str(SCRIPT.parents[1] / "scenes-tiny"))
    del sys.modules["make"]


def task_of(folder, test="test"):
    names = {"validation_path": "validation", "test_path": test}
    paths = {key: str(folder / f"{name}.jsonl") for key, name in names.items()}
    return make_task("jsonl", path=str(folder / "train.jsonl"), **paths)


def colours_of(picture):
    return {colour for _, colour in picture.image().getcolors(64 * 64)}


def test_its_problems_are_of_three_sets_of_pictures(made):
    folder, printed = made
    task = task_of(folder)
    sizes = {name: task.num_problems(name) for name in ("train", "validation", "test")}
    assert sizes == {"train": 9136, "validation": 1032, "test": 2537}
    assert re.search(r"9,136 problems; without its picture, 22\.\d% of the test is right", printed)
    colours = {"red": 0, "green": 1, "blue": 2}
    seen = 0
    for index in range(400):
        problem = task.problem("train", index)
        (picture,) = problem.images
        if "color" in problem.prompt and problem.answer in colours:
            # Of the shape's pixels the named colour is the strongest.
            shape = max(colours_of(picture), key=lambda colour: max(colour) - min(colour))
            assert shape.index(max(shape)) == colours[problem.answer]
            seen += 1
    assert seen > 20
    (black,) = task_of(folder, "blind").problem("test", 0).images
    assert colours_of(black) == {(0, 0, 0)}


def test_its_student_reads_the_pictures(made):
    folder, _ = made
    student = load_language_model(str(folder / "student"), device="cpu")
    assert student.vision is not None
    problem = task_of(folder).problem("test", 0)
    text = problem.prompt.replace("<image>", student.vision.token)
    prompt = student.vision.prompt(text, problem.images, add_special_tokens=True)
    (group,) = sample(
        student, [prompt], group_size=2, max_completion_tokens=8, temperature=1.0, seed=0
    )
    assert len(group) == 2
