"""Runs that end early, the out-of-distribution test, the control teacher, and what is told of each
token."""

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import rlad
from rlad.config.run import RunConfig
from rlad.engines.base import StepResult
from rlad.errors import UserError
from rlad.models.loading import load_language_model
from rlad.runs.directory import EVAL, METRICS, SAMPLES, RunDirectory
from rlad.stopping import StopRequested
from rlad.teachers import prepare_teacher
from rlad.teachers.local import LocalTeacher
from rlad.training.recorder import Recorder
from rlad.training.reporter import Reporter
from tiny_runs import OFTEN_CORRECT, remains, run_config

KDRL = {"objective": {"type": "kdrl"}, "optimization": {"num_steps": 6}}


def rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return list(RunDirectory(run_dir).read(name))


def evaluations(run_dir: Path) -> list[tuple[str, int]]:
    return [(row["split"], row["step"]) for row in rows(run_dir, EVAL)]


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))}
        for row in rows(run_dir, METRICS)
    ]


def test_training_in_the_import_of_a_worker_process_is_refused(world, tmp_path, monkeypatch):
    """A worker imports a script without `if __name__ == "__main__":`, which trains once more."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match="put it under `if __name__ == '__main__':`"):
        rlad.train(run_config(world, tmp_path / "run"))


# --- one process at a time ------------------------------------------------------------------------


def test_two_processes_do_not_train_in_one_run_directory(world, tmp_path):
    config = run_config(world, tmp_path / "run")
    rlad.train(config)
    before = remains(tmp_path / "run")
    with RunDirectory(tmp_path / "run").locked():
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(
                ValueError, match=r"another process is training in .*run; wait until it has ended"
            ):
                rlad.train(config, **how)
    assert remains(tmp_path / "run") == before
    rlad.train(config, overwrite=True)  # the lock is gone with its process


def test_a_finished_run_that_goes_on_is_not_finished_before_its_new_end(world, tmp_path):
    config = run_config(world, tmp_path / "run")
    rlad.train(config)
    run = RunDirectory(tmp_path / "run")
    assert run.is_finished()

    class Interrupts(Reporter):
        def step(self, result, num_steps):
            assert not run.is_finished()
            raise StopRequested(signal.SIGINT)

    config["optimization"] = config["optimization"] | {"num_steps": 8}
    with pytest.raises(StopRequested):
        rlad.train(config, resume=True, reporter=Interrupts())
    assert not run.is_finished()
    rlad.train(config, resume=True)
    assert run.is_finished() and len(rows(run.path, METRICS)) == 8


# --- runs that end early --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps without a limit."""
    return rlad.train(run_config(world, tmp_path_factory.mktemp("whole") / "run", **KDRL)).run_dir


def teacher_tokens(run_dir: Path) -> list[int]:
    """So far, by step."""
    counts = [row["teacher/tokens/count"] for row in rows(run_dir, METRICS)]
    return [int(sum(counts[:step])) for step in range(1, len(counts) + 1)]


@pytest.mark.parametrize(("beyond", "steps"), [(0, 3), (1, 4)])
def test_the_run_ends_with_the_step_that_reaches_the_teacher_tokens(
    world, tmp_path, whole, beyond, steps
):
    limit = teacher_tokens(whole)[2] + beyond
    config = run_config(world, tmp_path / "run", **KDRL)
    config["optimization"]["max_teacher_tokens"] = limit
    result = rlad.train(config)
    assert untimed(tmp_path / "run") == untimed(whole)[:steps]
    assert teacher_tokens(tmp_path / "run")[-1] >= limit > teacher_tokens(tmp_path / "run")[-2]
    # Steps 0 and 2 are multiples of every_steps; the last step is validated and tested wherever it
    # is.
    validated = sorted({0, 2, steps})
    assert evaluations(tmp_path / "run") == [
        ("test", 0),
        *(("validation", step) for step in validated),
        ("test", steps),
    ]
    assert RunDirectory(tmp_path / "run").checkpoints()[-1][0] == steps
    assert result.after.mean == rows(tmp_path / "run", EVAL)[-1]["pass@1"]["mean"]


def test_resuming_a_run_that_a_limit_has_ended_does_no_step(world, tmp_path, whole):
    config = run_config(world, tmp_path / "run", **KDRL)
    config["optimization"]["max_teacher_tokens"] = teacher_tokens(whole)[2]
    first = rlad.train(config)
    before = {
        path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()
    }
    again = rlad.train(config, resume=True)
    assert (again.before, again.after) == (first.before, first.after)
    assert {
        path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()
    } == before


def test_a_higher_limit_goes_on_to_the_same_end(world, tmp_path, whole):
    config = run_config(world, tmp_path / "run", **KDRL)
    config["optimization"]["max_teacher_tokens"] = teacher_tokens(whole)[2]
    rlad.train(config)
    del config["optimization"]["max_teacher_tokens"]
    rlad.train(config, resume=True)
    found = remains(tmp_path / "run")
    wanted = remains(whole)
    for name in (
        "metrics.jsonl",
        "samples.jsonl",
        "step 6: model.safetensors",
        "step 6: trainer/optimizer.safetensors",
    ):
        assert found[name] == wanted[name], name


def test_the_run_ends_with_the_step_that_reaches_the_seconds(world, tmp_path):
    config = run_config(world, tmp_path / "run", optimization={"max_seconds": 1e-6})
    rlad.train(config)
    assert [row["step"] for row in rows(tmp_path / "run", METRICS)] == [1]
    assert evaluations(tmp_path / "run") == [
        ("test", 0),
        ("validation", 0),
        ("validation", 1),
        ("test", 1),
    ]
    config["optimization"]["max_seconds"] = 1e6
    rlad.train(config, resume=True)
    assert [row["step"] for row in rows(tmp_path / "run", METRICS)] == [1, 2, 3, 4]


def test_only_training_counts_towards_the_seconds(world, tmp_path, monkeypatch):
    """What counts is the times of the steps' rows: steps of 50 seconds reach 100 with the second,
    evaluation or not."""

    class Clocked(Recorder):
        def step(self, result: StepResult, *, may_stop: bool) -> None:
            result.metrics.update({key: 0.0 for key in result.metrics if key.startswith("time/")})
            result.metrics["time/update/seconds"] = 50.0
            super().step(result, may_stop=may_stop)

    monkeypatch.setattr("rlad.training.run.Recorder", Clocked)
    config = run_config(world, tmp_path / "run", optimization={"max_seconds": 100.0})
    rlad.train(config)
    assert [row["step"] for row in rows(tmp_path / "run", METRICS)] == [1, 2]


def test_interrupted_in_its_last_validation_a_run_with_a_limit_still_gets_it(world, tmp_path):
    class InterruptedAt(Reporter):
        num_validations = 0

        def phase(self, name: str) -> None:
            self.num_validations += name == "evaluating on validation problems"
            if self.num_validations == 2:
                raise StopRequested(signal.SIGINT)

    config = run_config(world, tmp_path / "run", optimization={"max_seconds": 1e-6})
    with pytest.raises(StopRequested):
        rlad.train(config, reporter=InterruptedAt())
    assert evaluations(tmp_path / "run") == [("test", 0), ("validation", 0)]
    rlad.train(config, resume=True)
    assert evaluations(tmp_path / "run") == [
        ("test", 0),
        ("validation", 0),
        ("validation", 1),
        ("test", 1),
    ]
    assert [row["step"] for row in rows(tmp_path / "run", METRICS)] == [1]


# --- the out-of-distribution test -----------------------------------------------------------------


@pytest.fixture
def longer_sums(tmp_path: Path) -> str:
    path = tmp_path / "longer.jsonl"
    sums = [(a, b, c) for a in range(3) for b in range(2) for c in range(2)]
    lines = (
        f'{{"prompt": "{a} + {b} + {c} =", "answer": "{(a + b + c) % 3}"}}\n' for a, b, c in sums
    )
    path.write_text("".join(lines))
    return str(path)


def test_the_out_of_distribution_test_is_before_and_after_training(world, tmp_path, longer_sums):
    evaluation = {
        "ood_task": {"test_path": longer_sums},
        "num_ood_problems": 5,
        "num_test_samples": 3,
    }
    rlad.train(run_config(world, tmp_path / "run", evaluation=evaluation))
    rlad.train(run_config(world, tmp_path / "without", evaluation={"num_test_samples": 3}))
    recorded = rows(tmp_path / "run", EVAL)
    ood = [row for row in recorded if row["split"] == "ood"]
    assert [row["step"] for row in ood] == [0, 4]
    for row in ood:
        results = row["results"]
        assert [result["index"] for result in results] == list(range(5))
        assert all(
            result["prompt"].count("+") == 2 and result["num_samples"] == 3 for result in results
        )
        shares = [result["num_correct"] / 3 for result in results]
        assert row["pass@1"]["mean"] == pytest.approx(sum(shares) / 5)
    # It changes nothing else.
    assert [row for row in recorded if row["split"] != "ood"] == rows(tmp_path / "without", EVAL)
    assert untimed(tmp_path / "run") == untimed(tmp_path / "without")


@pytest.mark.parametrize(
    ("ood_task", "sentence"),
    [
        (
            {"num_poeple": [4]},
            "evaluation.ood_task.num_poeple is an unknown key: did you mean 'num_people'?",
        ),
        (
            {"num_people": [1]},
            "evaluation.ood_task.num_people[0] is 1: it must be greater than or equal to 2.",
        ),
        (
            {"type": "arithmetic", "x": [4]},
            "evaluation.ood_task.x is an unknown key: valid keys there are options, type",
        ),
        ({"type": "arithmetik"}, "evaluation.ood_task.type is 'arithmetik': it must be one of "),
    ],
)
def test_settings_that_the_task_does_not_have_are_refused_in_one_sentence(
    tmp_path, ood_task, sentence
):
    config = {
        "run_dir": str(tmp_path / "run"),
        "student": {"model": "embedded/student"},
        "teacher": {"model": "embedded/teacher"},
        "task": {"type": "knights_and_knaves"},
        "evaluation": {"ood_task": ood_task},
    }
    with pytest.raises(ValueError) as error:
        rlad.train(config)
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_out_of_distribution_prompts_are_measured_before_anything_is_written(
    world, tmp_path, longer_sums
):
    config = run_config(
        world,
        tmp_path / "run",
        rollout={"max_prompt_tokens": 4},
        evaluation={"ood_task": {"test_path": longer_sums}},
    )
    with pytest.raises(
        ValueError, match="the prompt of out-of-distribution test problem 0 has 6 tokens"
    ):
        rlad.train(config)
    assert not (tmp_path / "run").exists()


# --- the control teacher --------------------------------------------------------------------------


def weights_of_teacher(world: Path, **settings: Any) -> dict[str, torch.Tensor]:
    config = RunConfig.model_validate(run_config(world, world / "none", **settings))
    student = load_language_model(str(world / "student"))
    teacher = prepare_teacher(config, student)
    assert isinstance(teacher, LocalTeacher)
    loaded = teacher.language_model
    assert not loaded.model.training
    return dict(loaded.model.state_dict())


def test_random_weights_are_those_of_the_seed_and_not_the_model_s(world):
    teacher = {"random_weights": True}
    pretrained = weights_of_teacher(world)
    random = weights_of_teacher(world, teacher=teacher)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = weights_of_teacher(world, teacher=teacher)
    other = weights_of_teacher(world, teacher=teacher, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {k: v.shape for k, v in random.items()} == {k: v.shape for k, v in pretrained.items()}
    assert all(torch.equal(random[name], again[name]) for name in random)
    matrices = [name for name, value in random.items() if value.dim() == 2]
    assert len(matrices) > 5
    for name in matrices:  # norms are 1 whatever the seed
        assert not torch.allclose(random[name], pretrained[name], atol=1e-3), name
        assert not torch.allclose(random[name], other[name], atol=1e-3), name


def test_a_run_with_a_random_teacher(world, tmp_path):
    for name, teacher in (
        ("first", {"random_weights": True}),
        ("second", {"random_weights": True}),
        ("pretrained", {}),
    ):
        rlad.train(run_config(world, tmp_path / name, teacher=teacher, **KDRL))
    assert untimed(tmp_path / "first") == untimed(tmp_path / "second")
    ratios = [
        [row["teacher/log_ratio/mean"] for row in untimed(tmp_path / name)]
        for name in ("first", "pretrained")
    ]
    assert abs(ratios[0][0] - ratios[1][0]) > 1e-3
    assert RunDirectory(tmp_path / "first").is_finished()


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["trrd", "opd"])
def test_samples_tell_of_each_token(world, tmp_path, objective):
    rlad.train(
        run_config(world, tmp_path / "run", objective={"type": objective}, task=OFTEN_CORRECT)
    )
    recorded = rows(tmp_path / "run", SAMPLES)
    assert [row["step"] for row in recorded] == [1, 2, 3, 4]
    rollouts = [rollout for row in recorded for rollout in row["rollouts"]]
    for row in recorded:
        rewards = {rollout["reward"] for rollout in row["rollouts"]}
        for rollout in row["rollouts"]:
            token_ids = rollout["completion"]["token_ids"]
            assert len(rollout["tokens"]) == len(token_ids)
            assert "<eos>" not in rollout["tokens"][:-1]
            is_told = objective == "trrd" and len(rewards) > 1
            assert (rollout["imitation"] is not None) == is_told
            if is_told:
                lengths = {name: len(values) for name, values in rollout["imitation"].items()}
                assert lengths == dict.fromkeys(
                    ("fates", "advantages", "clamped", "log_ratio_to_teacher"), len(token_ids)
                )
    assert any(rollout["imitation"] for rollout in rollouts) == (objective == "trrd")
