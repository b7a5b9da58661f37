import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from rlad.errors import UserError
from rlad.tasks import SPLITS, TASKS, make_task


def test_the_table_names_every_task():
    names = (
        "knights_and_knaves arithmetic countdown reasoning_gym jsonl scenes gsm8k aime2025 several"
    )
    assert list(TASKS) == [*names.split(), "environment", "sokoban", "island_questions"]


def test_importing_tasks_imports_nothing_heavy():
    show = "import rlad.tasks, sys; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", show], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"rlad.tasks.verifiers", "rlad.tasks.reasoning_gym"} <= set(modules)
    assert not {
        "torch",
        "transformers",
        "numpy",
        "sympy",
        "reasoning_gym",
        "math_verify",
        "datasets",
    } & set(modules)


def test_make_task_passes_the_options_on():
    task = make_task("knights_and_knaves", num_people=[2, 4], instructions=False)
    assert task.name == "knights_and_knaves"
    assert [task.problem("train", index).difficulty for index in range(2)] == [
        "2 people",
        "4 people",
    ]
    task.close()


@pytest.mark.parametrize(
    ("type", "options", "sentence"),
    [
        ("jsnl", {"path": "p"}, "task.type is 'jsnl': .*, did you mean 'jsonl'?"),
        ("jsonl", {"path": "p", "verifer": "math"}, "unknown key: did you mean 'verifier'?"),
        ("jsonl", {}, "task.path is missing: add it to the config."),
    ],
)
def test_names_and_options_that_there_are_not_are_one_sentence(type, options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_task(type, **options)


def test_every_task_keeps_the_contract(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}?", "answer": i}) for i in range(60)))
    # Test sets have no training problems, and episodes no reference answers.
    names = TASKS.keys() - {"gsm8k", "aime2025", "environment", "sokoban", "island_questions"}
    options: dict[str, Any] = {"jsonl": {"path": str(path)}, "reasoning_gym": {"dataset": "gcd"}}
    options["several"] = {
        "tasks": {
            "logic": {"type": "knights_and_knaves"},
            "file": {"type": "jsonl", **options["jsonl"]},
        }
    }
    if importlib.util.find_spec("reasoning_gym") is None:
        names -= {"arithmetic", "countdown", "reasoning_gym"}
    for name in names:
        task = make_task(name, **options.get(name, {}))
        for split in SPLITS:
            problem = task.problem(split, 3, seed=1)
            assert problem == task.problem(split, 3, seed=1)
            assert problem.prompt and problem.answer and problem.key
            assert json.dumps(problem.metadata)
            assert task.judge(problem, f"I think so.\nAnswer: {problem.answer}").reward == 1
            assert task.judge(problem, "Answer: 7, or what was it?").reward == 0
            num = task.num_problems(split)
            assert num is None or num > 0
        task.close()
