"""Every TOML below recipes/ is a config that runs would take; what the recipes' scripts make is
what they say."""

import json
import re
import tomllib
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rlad
from loaded_scripts import load_script
from rlad import load_config
from rlad.config.comparison import load_comparison
from rlad.errors import UserError
from rlad.models.loading import LanguageModel, load_language_model
from rlad.tasks import make_task
from rlad.tasks.numbers import Amount, read_number
from rlad.tasks.scenes import model_answer
from tiny_models import EOS, tiny_model, tiny_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
TOMLS = sorted(RECIPES.rglob("*.toml"))
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def validate(path: Path) -> None:
    """Raise `UserError` for a setting that does not exist or cannot be."""
    if "methods" in tomllib.loads(path.read_text(encoding="utf-8")):
        load_comparison(str(path), [])
    else:
        load_config(path)


@pytest.mark.parametrize("path", TOMLS, ids=name_of)
def test_a_recipe_is_a_config(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)  # from where the recipes' commands are run
    validate(path)


@pytest.mark.parametrize("path", TOMLS, ids=name_of)
def test_a_misspelt_setting_in_a_recipe_is_found(path, tmp_path, monkeypatch):
    """The check above can fail."""
    monkeypatch.chdir(RECIPES.parent)
    (tmp_path / "run.toml").write_text(
        "learning_rat = 1\n" + path.read_text(encoding="utf-8"), encoding="utf-8"
    )
    with pytest.raises(UserError, match="learning_rat"):
        validate(tmp_path / "run.toml")


def test_every_recipe_has_a_row_in_the_documentation():
    rows = (RECIPES.parent / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    folders = {
        path.name
        for path in RECIPES.iterdir()
        if path.is_dir() and not path.name.startswith((".", "_"))
    }
    linked = {
        name
        for row in rows
        if row.startswith("| [")
        for name in re.findall(r"\(\.\./recipes/([^/]+)/", row)
    }
    assert linked == folders


@pytest.mark.parametrize("path", TOMLS, ids=name_of)
def test_a_recipe_is_explained(path):
    """The README beside it, or in the folder above, names the file."""
    readmes = [
        folder / "README.md"
        for folder in (path.parent, path.parent.parent)
        if folder != RECIPES.parent
    ]
    texts = [readme.read_text(encoding="utf-8") for readme in readmes if readme.is_file()]
    assert any(path.name in text or path.stem in text for text in texts)


def test_the_default_as_a_recipe_is_the_default():
    ours, default = load_config(RECIPES / "knights-knaves-tiny" / "run.toml"), load_config()
    assert ours.model_dump(exclude={"run_dir"}) == default.model_dump(exclude={"run_dir"})


@pytest.mark.parametrize("name", ["run.toml", "run-lora.toml", "grpo.toml"])
def test_the_runs_of_a_recipe_differ_in_what_they_say(name):
    """Same task, sampling and evaluation: what is compared is the student's training alone."""
    folder = RECIPES / "arithmetic-smollm2"
    run, other = load_config(folder / "run.toml"), load_config(folder / name)
    assert (
        other.task == run.task
        and other.rollout.temperature == run.rollout.temperature == run.evaluation.temperature
    )
    assert other.evaluation.num_test_problems == 98 and other.evaluation.num_test_samples == 4


# --- the teacher of arithmetic-smollm2 -----------------------------------------------------------


@pytest.fixture(scope="module")
def make_teacher() -> ModuleType:
    return load_script(RECIPES / "arithmetic-smollm2" / "make_teacher.py")


@pytest.mark.parametrize(
    ("largest", "splits"), [((30, 20), (803, 109, 98)), ((60, 40), (3210, 405, 405))]
)
def test_its_problems_are_all_there_once_and_right(make_teacher, tmp_path, largest, splits):
    make_teacher.write_problems(tmp_path / "problems.jsonl", largest)
    rows = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        match = re.fullmatch(r".*: ([0-9]+) ([+-]) ([0-9]+) =", row["prompt"])
        assert match is not None
        a, sign, b = int(match[1]), match[2], int(match[3])
        assert int(row["answer"]) == (a + b if sign == "+" else a - b) >= 0
        found[a, sign, b] = row
    first, second = (range(1, one + 1) for one in largest)
    expected = len(first) * len(second) + sum(a >= b for a in first for b in second)
    assert len(found) == len(rows) == expected == sum(splits)
    task = make_task("jsonl", path=str(tmp_path / "problems.jsonl"), verifier="number")
    assert tuple(map(task.num_problems, ("train", "validation", "test"))) == splits
    problem = task.problem("test", 0)
    assert task.judge(problem, make_teacher.RIGHT_ANSWER.format(answer=problem.answer)).reward == 1
    wrong = make_teacher.RIGHT_ANSWER.format(answer=int(problem.answer) + 1)
    assert task.judge(problem, wrong).reward == 0
    assert read_number(wrong, is_marked=False) == Amount(Fraction(int(problem.answer) + 1))


def test_larger_problems_are_tested_on_none_that_the_teacher_trains_on(make_teacher, tmp_path):
    tasks = []
    for largest in (make_teacher.LARGEST, make_teacher.LARGEST_OF_SEARCH):
        path = tmp_path / f"{largest[0]}.jsonl"
        make_teacher.write_problems(path, largest)
        tasks.append(make_task("jsonl", path=str(path), verifier="number"))

    def prompts(task, split):
        return {task.problem(split, i, seed=0).prompt for i in range(task.num_problems(split))}

    assert len(prompts(tasks[0], "train")) == 803
    assert prompts(tasks[0], "train") <= prompts(tasks[1], "train")
    assert not prompts(tasks[0], "train") & prompts(tasks[1], "test")


def write_tiny_world(folder: Path) -> None:
    """A student with a chat template, and problems, as the recipe has them."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_model(seed=3).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    rows = [{"prompt": f"w{3 + i} w9", "answer": f"w{20 + i % 3}"} for i in range(40)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_its_warm_up_teaches_right_answers_that_end(make_teacher, tmp_path, monkeypatch, capsys):
    write_tiny_world(tmp_path)
    for name, value in {
        "RIGHT_ANSWER": "w8 {answer}",
        "NUM_STEPS": 30,
        "BATCH_SIZE": 8,
        "LEARNING_RATE": 1e-2,
    }.items():
        monkeypatch.setattr(make_teacher, name, value)
    task = make_task("jsonl", path=str(tmp_path / "problems.jsonl"))
    student = load_language_model(str(tmp_path / "student"), trainable=True)
    prompt, completion = make_teacher.right_answer(student, task.problem("train", 0))
    assert (
        student.tokenizer.decode(completion[:-1]) == f"w8 {task.problem('train', 0).answer}"
        and completion[-1] == EOS
    )
    assert student.tokenizer.decode(prompt) == task.problem("train", 0).prompt
    make_teacher.warm_up(student, task)
    losses = [float(value) for value in re.findall(r"loss ([0-9.]+)", capsys.readouterr().out)]
    assert len(losses) == 30 and losses[0] > 3 and losses[-1] < 1
    with torch.no_grad():
        ids = torch.tensor([prompt])
        written = student.model.generate(ids, max_new_tokens=3, do_sample=False)[
            0, len(prompt) :
        ].tolist()  # type: ignore[operator]
    assert written[0] == completion[0] and written[2] == EOS


def test_it_may_be_started_again_after_an_interrupted_save(make_teacher, tmp_path, monkeypatch):
    """Killed when the config is written and the weights are not: nothing is taken for a model, and
    the next start makes it."""
    write_tiny_world(tmp_path)
    monkeypatch.setattr(make_teacher, "NUM_STEPS", 2)
    monkeypatch.setattr(make_teacher, "RIGHT_ANSWER", "w8 {answer}")
    arguments = str(tmp_path / "student"), tmp_path / "problems.jsonl", tmp_path / "warm"

    def interrupted(language_model: LanguageModel, folder: Path) -> None:
        language_model.model.config.save_pretrained(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_teacher, "save_model", interrupted)
        make_teacher.write_warm_student(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems.jsonl", "student"]
    make_teacher.write_warm_student(*arguments)
    warm = load_language_model(str(tmp_path / "warm")).model.state_dict()
    raw = load_language_model(str(tmp_path / "student")).model.state_dict()
    assert any(not torch.equal(warm[name], raw[name]) for name in raw)
    monkeypatch.setattr(make_teacher, "warm_up", None)
    make_teacher.write_warm_student(*arguments)  # what is there is not made again


def test_its_teacher_is_the_model_of_a_checkpoint_whole_or_absent(
    make_teacher, tmp_path, monkeypatch
):
    checkpoint, teacher = tmp_path / "step-000010", tmp_path / "teacher"
    tiny_model(seed=3).save_pretrained(checkpoint)
    (checkpoint / "trainer").mkdir()
    (checkpoint / "manifest.json").touch()
    teacher.mkdir()
    (teacher / "of an older run").touch()
    make_teacher.write_teacher(checkpoint, teacher)
    files = {
        file.name: file.read_bytes()
        for file in checkpoint.iterdir()
        if file.suffix in (".safetensors", ".json")
    }
    assert {file.name: file.read_bytes() for file in teacher.iterdir()} == {
        name: content for name, content in files.items() if name != "manifest.json"
    }

    def interrupted(source: Path, target: Path, **how: Any) -> None:
        (target / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(make_teacher.shutil, "copytree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_teacher.write_teacher(checkpoint, teacher)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_the_scenes_recipe_makes_models_that_train(tmp_path, capsys):
    """A few steps of each phase show that it runs, not that the models learn."""
    make = load_script(RECIPES / "scenes-tiny" / "make.py")
    make.main(["--out", str(tmp_path), "--smoke"])
    config = load_config(
        RECIPES / "scenes-tiny" / "run.toml",
        [
            f"student.model={tmp_path}/student",
            f"run_dir={tmp_path}/run",
            "rollout.prompts_per_batch=2",
            "rollout.max_completion_tokens=8",
            "optimization.num_steps=1",
            "evaluation.num_test_problems=2",
            "evaluation.num_ood_problems=2",
            "evaluation.num_validation_problems=2",
        ],
    )
    result = rlad.train(config)
    assert (result.run_dir / "samples.jsonl").read_text().count("data:image/png;base64,") == 1
    tokenizer = load_language_model(str(tmp_path / "teacher"), device="cpu").tokenizer
    text = model_answer(make_task("scenes").problem("train", 0))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
