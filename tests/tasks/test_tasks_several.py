"""Several tasks in one run: turns, splits, grading by the owner, and what config and evaluation
make of them."""

import json
from pathlib import Path
from typing import Any

import pytest

import rlad
from rlad.config.file import (
    changed_settings,
    dump_config,
    load_config,
    parse_config,
    parse_overrides,
)
from rlad.config.run import RunConfig
from rlad.config.task import CountdownConfig, KnightsAndKnavesConfig
from rlad.runs.directory import RunDirectory
from rlad.tasks import SPLITS, Verdict, make_task
from rlad.tasks.references import require_working_verifier
from tiny_runs import FILES, run_config

LOGIC = {"type": "knights_and_knaves", "num_people": [2, 3]}


def write_problems(folder: Path, name: str, **sizes: int) -> dict[str, Any]:
    """A jsonl task with so many problems in each file; returns its section."""
    files = {}
    for split, number in sizes.items():
        files[split] = str(folder / f"{name}-{split}.jsonl")
        rows = [
            json.dumps({"prompt": f"{name} {split} {i}", "answer": str(i)}) + "\n"
            for i in range(number)
        ]
        Path(files[split]).write_text("".join(rows))
    paths = {f"{split}_path" if split != "train" else "path": file for split, file in files.items()}
    return {"type": "jsonl", "verifier": "number", **paths}


@pytest.fixture
def several(tmp_path: Path) -> dict[str, Any]:
    """`few`: 3 training, 2 validation and 4 test problems; `many`: 5, 3 and 2."""
    few = write_problems(tmp_path, "few", train=3, validation=2, test=4)
    many = write_problems(tmp_path, "many", train=5, validation=3, test=2)
    return {"few": few, "many": many}


def test_problems_are_those_of_each_task_in_turn(several):
    tasks = several | {"logic": LOGIC}
    together = make_task("several", tasks=tasks)
    alone = [make_task(**options) for options in tasks.values()]
    for split in SPLITS:
        for index in (17, 0, 1, 2, 3, 17, 100):  # in any order, and again
            problem = together.problem(split, index, seed=5)
            name = list(tasks)[index % 3]
            own = alone[index % 3].problem(split, index // 3, seed=5)
            assert problem.task == name
            assert problem.difficulty == (f"logic, {own.difficulty}" if name == "logic" else name)
            for field in ("prompt", "answer", "key", "metadata"):
                assert getattr(problem, field) == getattr(own, field)
    assert together.problem("train", 2, seed=5) != together.problem("train", 2, seed=6)


def test_training_gives_all_of_each_task_and_held_out_problems_come_once(several):
    task = make_task("several", tasks=several)
    assert {split: task.num_problems(split) for split in SPLITS} == {
        "train": 10,
        "validation": 4,
        "test": 4,
    }
    assert len({task.problem("train", i).prompt for i in range(10)}) == 3 + 5
    for split in ("validation", "test"):
        assert len({task.problem(split, i).prompt for i in range(4)}) == 4
    assert make_task("several", tasks={"a": LOGIC, "b": LOGIC}).num_problems("test") is None
    assert (
        make_task("several", tasks={"logic": LOGIC, "few": several["few"]}).num_problems("test")
        == 8
    )


def test_each_problem_is_graded_by_its_own_task(several):
    exact = several["few"] | {"verifier": "exact"}
    task = make_task("several", tasks={"exact": exact, "number": several["few"], "logic": LOGIC})
    exact_problem, number_problem, puzzle = (task.problem("train", i) for i in range(3))
    assert exact_problem.answer == number_problem.answer
    answer = f"{exact_problem.answer}.0"
    assert task.judge(exact_problem, answer).verdict == Verdict.WRONG
    assert task.judge(number_problem, answer).verdict == Verdict.CORRECT
    assert task.judge(puzzle, f"Answer: {puzzle.answer}").verdict == Verdict.CORRECT
    assert task.judge(puzzle, number_problem.answer).verdict == Verdict.WRONG


def test_one_task_whose_verifier_cannot_judge_is_found_among_others(several):
    broken = several["many"] | {"verifier": "run_verifiers:always_nan"}
    require_working_verifier(make_task("several", tasks=several))
    with pytest.raises(
        ValueError, match="verifier of task 'jsonl' cannot judge the reference answers"
    ):
        require_working_verifier(make_task("several", tasks=several | {"broken": broken}))


def test_mistakes_of_one_task_name_it():
    with pytest.raises(ValueError, match=r"^task 'sums': no\.jsonl cannot be read"):
        make_task("several", tasks={"logic": LOGIC, "sums": {"type": "jsonl", "path": "no.jsonl"}})


# --- config ---------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "task": {
        "type": "several",
        "tasks": {"logic": LOGIC, "sums": {"type": "jsonl", "path": "p.jsonl"}},
    },
}


def changed(*overrides: str) -> RunConfig:
    return parse_config(parse_overrides(json.loads(json.dumps(BASE)), overrides))


def test_the_config_reads_back_and_takes_overrides(tmp_path):
    config = changed("task.tasks.logic.num_people=[4]")
    assert config.task.tasks["logic"].num_people == (4,)  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "run.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.toml") == config
    overrides = [f"{key}={value}" for key, value in changed_settings(config).items()]
    assert parse_config(parse_overrides({}, overrides)) == config
    assert config.directory == Path("runs/several-trrd-seed0")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["task.tasks.logic.num_people=[2, 9]"],
            "task.tasks.logic.num_people[1] is 9: it must be less than or equal to 8.",
        ),
        (
            ["task.tasks.logic.people=[2]"],
            "task.tasks.logic.people is an unknown key: did you mean 'num_people'?",
        ),
        (
            ["task.tasks.new={path='p'}"],
            "task.tasks.new.type is missing: this section must name its type.",
        ),
        (
            ["task.tasks.sums={type='jsonl'}"],
            "task.tasks.sums.path is missing: add it to the config.",
        ),
        (["task.tasks.sums={type='arithmetics'}"], "gsm8k, aime2025, did you mean 'arithmetic'?"),
        (
            ["task.tasks.sums={type='several', tasks={}}"],
            "arithmetic, countdown, reasoning_gym, jsonl, scenes, gsm8k, aime2025.",
        ),
        (["task.tasks={}"], "task.tasks is {}: it must have at least 1 item."),
        (["task={type='several'}"], "task.tasks is missing: add it to the config."),
        (
            ["evaluation.ood_task={num_people=[4]}"],
            "ood_task.num_people is an unknown key: valid keys there are tasks, type.",
        ),
        (
            ["evaluation.ood_task={tasks={logik={}}}"],
            "tasks names 'logik', which is not a task of the run; use some of logic, sums.",
        ),
        (
            ["evaluation.ood_task={tasks={logic=4}}"],
            "evaluation.ood_task.tasks.logic is 4: it must be a section, with keys of its own.",
        ),
        (
            ["evaluation.ood_task={tasks={logic={num_people=[9]}}}"],
            "evaluation.ood_task.tasks.logic.num_people[0] is 9: it must be less than or equal to "
            "8.",
        ),
    ],
)
def test_sentence(overrides, sentence):
    with pytest.raises(ValueError) as error:
        changed(*overrides)
    (found,) = str(error.value).splitlines()
    assert found.endswith(sentence)


def test_the_out_of_distribution_test_holds_the_named_tasks_alone():
    ood: Any = changed("evaluation.ood_task={tasks={logic={num_people=[4]}}}").ood_task
    assert ood.tasks == {"logic": KnightsAndKnavesConfig(num_people=(4,))}
    assert make_task(**ood.model_dump()).problem("test", 3).difficulty == "logic, 4 people"


def test_a_task_of_another_type_keeps_no_setting_of_the_first():
    ood: Any = changed("evaluation.ood_task={tasks={logic={type='countdown'}}}").ood_task
    assert ood.tasks == {"logic": CountdownConfig()}


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_shows_each_task_in_its_evaluations(world, tmp_path):
    files = {name: str(world / f"{name}.jsonl") for name in FILES}
    one = {"type": "jsonl", "verifier": "number", **files}
    config = run_config(world, tmp_path / "run", optimization={"num_steps": 1})
    config["task"] = {"type": "several", "tasks": {"sums": one, "same": one}}
    config["evaluation"] |= {
        "num_test_problems": 4,
        "ood_task": {"tasks": {"sums": {"verifier": "exact"}}},
    }
    rlad.train(config)
    rows = list(RunDirectory(tmp_path / "run").read("eval.jsonl"))
    shown = {row["split"]: [result["difficulty"] for result in row["results"]] for row in rows}
    assert shown["test"] == ["sums", "same"] * 2 and shown["ood"] == ["sums", "sums"]
    assert rlad.load_config(tmp_path / "run").task.type == "several"
