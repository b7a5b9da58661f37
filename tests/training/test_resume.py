"""A run that was interrupted anywhere and resumed leaves behind, bit for bit, what the
uninterrupted run does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

import rlad
import rlad.training.run
from killed_runs import kill_and_compare
from rlad.config.distributions import MOPDConfig
from rlad.engines.native.loop import NativeEngine
from rlad.errors import UserError
from rlad.models.loading import load_language_model
from rlad.objectives import OBJECTIVES
from rlad.runs.directory import RunDirectory
from rlad.stopping import StopRequested
from tiny_environments import Adding, InThisProcess
from tiny_runs import OFTEN_CORRECT, StopAt, objective_section, remains, run_config, write_model

# Everything that has a state: several steps on one rollout batch, reference, annealing, schedule,
# momentum, micro-batches.
SECTIONS: dict[str, Any] = {
    "objective": {"type": "trrd", "alpha": {"start": 0.8, "end": 0.3, "change_per_step": -0.1}},
    "rollout": {"prompts_per_batch": 4, "group_size": 3, "max_completion_tokens": 4},
    "optimization": {
        "num_steps": 6,
        "steps_per_rollout_batch": 2,
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "kl_coef": 0.05,
        "tokens_per_batch": 24,
    },
    "evaluation": {
        "every_steps": 3,
        "num_validation_problems": 2,
        "num_test_problems": 2,
        "num_validation_samples": 2,
        "num_test_samples": 2,
    },
}


@pytest.fixture(scope="module")
def uninterrupted(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = run_config(world, tmp_path_factory.mktemp("uninterrupted") / "run", **SECTIONS)
    rlad.train(config)
    return remains(Path(config["run_dir"]))


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda at: monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(at))


def assert_same(found: dict[str, Any], wanted: dict[str, Any], when: object) -> None:
    assert found.keys() == wanted.keys(), when
    assert [name for name in wanted if found[name] != wanted[name]] == [], when


def test_interrupted_at_any_safe_point(world, tmp_path, uninterrupted, stop_at):
    stop_at(-1)
    rlad.train(run_config(world, tmp_path / "count" / "run", **SECTIONS))
    total = StopAt.num_checks
    assert total > 60
    for at in range(1, total + 1, 13):
        config = run_config(world, tmp_path / str(at) / "run", **SECTIONS)
        stop_at(at)
        with pytest.raises(StopRequested):
            rlad.train(config)
        stop_at(-1)
        rlad.train(config, resume=True)
        assert_same(
            remains(Path(config["run_dir"])),
            uninterrupted,
            f"stopped at safe point {at} of {total}",
        )


def test_interrupted_again_and_again(world, tmp_path, uninterrupted, stop_at):
    """Each session is a little longer than a rollout batch and its first update."""
    config = run_config(world, tmp_path / "run", **SECTIONS)
    stop_at(30)
    num_sessions = 0
    is_finished = False
    while not is_finished:
        try:
            rlad.train(config, resume=num_sessions > 0)
            is_finished = True
        except StopRequested:
            num_sessions += 1
        assert num_sessions < 30
    assert num_sessions >= 3
    assert_same(remains(tmp_path / "run"), uninterrupted, "after many sessions")


def test_between_minibatches_the_rollout_batch_is_kept(world, tmp_path):
    class AfterFirstStep(rlad.training.reporter.Reporter):
        def step(self, result: Any, num_steps: int) -> None:
            raise StopRequested(signal.SIGINT)

    config = run_config(world, tmp_path / "run", **SECTIONS)
    with pytest.raises(StopRequested):
        rlad.train(config, reporter=AfterFirstStep())
    (step, folder) = RunDirectory(tmp_path / "run").checkpoints()[-1]
    state = json.loads((folder / "trainer" / "state.json").read_text())
    assert (step, state["step"], state["pending"]["index"], len(state["pending"]["groups"])) == (
        1,
        1,
        0,
        4,
    )
    assert "time/generation/seconds" in state["pending"]["seconds"]


def test_weights_give_the_same_numbers_wherever_they_stand_in_their_file(tmp_path):
    """The last bits of a product depend on the alignment of the matrix, and the headers of
    checkpoints differ in length."""
    logits = []
    for padding in range(0, 64, 8):
        folder = write_model(tmp_path / str(padding), seed=1, hidden_size=128, head_dim=64)
        tensors = load_file(folder / "model.safetensors")
        save_file(
            tensors,
            folder / "model.safetensors",
            metadata={"format": "pt", "padding": "x" * padding},
        )
        logits.append(load_language_model(str(folder)).model(torch.tensor([[3]])).logits)
    assert all(torch.equal(logits[0], other) for other in logits)


class StopBehind(rlad.training.reporter.Reporter):
    """Stops the run behind the steps with these numbers."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def step(self, result: Any, num_steps: int) -> None:
        if result.step in self.steps:
            raise StopRequested(signal.SIGINT)


@pytest.mark.parametrize("objective", [*OBJECTIVES, "opd_then_grpo"])
def test_every_objective_resumes_between_and_behind_its_minibatches(world, tmp_path, objective):
    """Of `opd_then_grpo`, steps 1 to 4 are OPD and 5 and 6 GRPO: the stop behind step 4 is the
    switch."""
    sections = SECTIONS | {"objective": objective_section(objective)}
    whole = run_config(world, tmp_path / "whole" / "run", **sections)
    rlad.train(whole)
    config = run_config(world, tmp_path / "stopped" / "run", **sections)
    for resumed, step in enumerate((1, 4, 5)):
        with pytest.raises(StopRequested):
            rlad.train(config, resume=resumed > 0, reporter=StopBehind(step))
    rlad.train(config, resume=True)
    assert_same(
        remains(tmp_path / "stopped" / "run"), remains(tmp_path / "whole" / "run"), objective
    )
    if objective == "opd_then_grpo":
        rows = list(RunDirectory(tmp_path / "stopped" / "run").read("metrics.jsonl"))
        assert ["teacher/log_ratio/mean" in row for row in rows] == [True] * 4 + [False] * 2
        assert [row["step"] for row in rows if "teacher/tokens/count" in row] == [1, 3]


def test_a_student_that_teaches_itself_from_its_peers_resumes_exactly(world, tmp_path):
    """The average moves between the rollout batches and is in the checkpoint; what it is shown of
    the group is found again."""
    sections = SECTIONS | {"objective": objective_section("mopd"), "task": OFTEN_CORRECT}
    sections["rollout"] = {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 4}
    teacher = {"teacher": MOPDConfig.default_teacher}
    whole = run_config(world, tmp_path / "whole" / "run", **sections) | teacher
    rlad.train(whole)
    rows = list(RunDirectory(tmp_path / "whole" / "run").read("metrics.jsonl"))
    assert sum(row.get("teacher/shown_successes/mean", 0) > 0 for row in rows) >= 3
    assert any(row.get("teacher/speaks/frac", 1) < 1 for row in rows)
    assert max(row["teacher/divergence/mean"] for row in rows[2:]) > 0
    config = run_config(world, tmp_path / "stopped" / "run", **sections) | teacher
    for resumed, step in enumerate((1, 2, 5)):
        with pytest.raises(StopRequested):
            rlad.train(config, resume=resumed > 0, reporter=StopBehind(step))
    rlad.train(config, resume=True)
    assert_same(remains(tmp_path / "stopped" / "run"), remains(tmp_path / "whole" / "run"), "mopd")


def test_the_length_of_opd_then_grpo_is_part_of_what_it_is(world, tmp_path):
    """With twice the steps the switch would have been elsewhere."""
    config = run_config(world, tmp_path / "run", objective={"type": "opd_then_grpo"})
    rlad.train(config)
    config["optimization"]["num_steps"] = 8
    with pytest.raises(ValueError, match="has a run with another config"):
        rlad.train(config, resume=True)


AUTO: dict[str, Any] = {
    "objective": {"type": "opd_then_grpo", "opd_share": "auto", "auto_patience": 2}
    | {"auto_min_gain": 1.0},
    "evaluation": SECTIONS["evaluation"] | {"every_steps": 1},
}
"""No validation after the first can be a gain, so opd ends after step 2."""


def without_phases(config: dict[str, Any]) -> list[dict[str, Any]]:
    rows = RunDirectory(rlad.train(config).run_dir).read("metrics.jsonl")
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))}
        for row in rows
    ]


def test_a_switch_by_validation_is_that_of_a_share(world, tmp_path):
    """After step 2 of 4, and in batches of three steps after the third."""
    for steps_per_batch, share in ((1, 0.5), (3, 0.5)):
        loop = {"num_steps": 4 if steps_per_batch == 1 else 6, "learning_rate": 3e-3}
        sections = AUTO | {
            "rollout": {"prompts_per_batch": 3},
            "optimization": loop | {"steps_per_rollout_batch": steps_per_batch},
        }
        folder = tmp_path / str(steps_per_batch)
        auto = without_phases(run_config(world, folder / "auto", **sections))
        sections["objective"] = {"type": "opd_then_grpo", "opd_share": share}
        fixed = without_phases(run_config(world, folder / "fixed", **sections))
        assert auto == fixed
        phases = [row["objective/teacher_phase/frac"] for row in auto]
        half = loop["num_steps"] // 2
        assert phases == [1.0] * half + [0.0] * half


@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (1, 2, 3, 4)])
def test_a_switch_by_validation_resumes_exactly(world, tmp_path, stops):
    """Before, at and after the switch; and a longer run is the same up to where it was ended."""
    whole = run_config(world, tmp_path / "whole" / "run", **AUTO)
    whole["optimization"]["num_steps"] = 6
    rlad.train(whole)
    config = run_config(world, tmp_path / "stopped" / "run", **AUTO)
    config["optimization"]["num_steps"] = 6
    for resumed, step in enumerate(stops):
        with pytest.raises(StopRequested):
            rlad.train(config, resume=resumed > 0, reporter=StopBehind(step))
    rlad.train(config, resume=True)
    assert_same(remains(tmp_path / "stopped" / "run"), remains(tmp_path / "whole" / "run"), stops)


def test_the_validation_at_the_end_of_a_run_decides_nothing_unless_it_is_due(world, tmp_path):
    """Validations after 0, 2 and 4 steps; that after 3, where the run ended first, does not
    count."""
    sections = AUTO | {"evaluation": SECTIONS["evaluation"] | {"every_steps": 2}}
    config = run_config(world, tmp_path / "run", **sections)
    config["optimization"]["num_steps"] = 6
    whole = rlad.train(config | {"run_dir": str(tmp_path / "whole")})
    rows = list(RunDirectory(whole.run_dir).read("metrics.jsonl"))
    budget = {"max_teacher_tokens": sum(int(row["teacher/tokens/count"]) for row in rows[:3])}
    rlad.train(config | {"optimization": config["optimization"] | budget})
    rows = RunDirectory(tmp_path / "run").read("eval.jsonl")
    assert [row["step"] for row in rows if row["split"] == "validation"] == [0, 2, 3]
    rlad.train(config, resume=True)
    rows = RunDirectory(tmp_path / "run").read("metrics.jsonl")
    assert [row["objective/teacher_phase/frac"] for row in rows] == [1, 1, 1, 1, 0, 0]


# --- killed ---------------------------------------------------------------------------------------


CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree")


def die_at_change(config: dict[str, Any], at: int) -> int:
    """Train in a fork that dies, as by SIGKILL, just before the `at`-th change of its run
    directory; its exit code."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    num_changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_changes
        is_change = event in CHANGES or (event == "open" and set(str(arguments[1])) & set("wa+"))
        if is_change and str(arguments[0]).startswith(config["run_dir"]):
            num_changes += 1
            if num_changes == at:
                os._exit(137)

    sys.addaudithook(count)
    code = 1
    try:
        rlad.train(config)
        code = 0
    finally:
        os._exit(code)


def test_killed_at_any_change_of_the_run_directory(world, tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    code = 137
    at = 1
    while code == 137:
        run_dir = tmp_path / str(at) / "run"
        config = run_config(world, run_dir, **SECTIONS)
        code = die_at_change(config, at)
        if code == 137:
            rlad.train(config, resume=RunDirectory(run_dir).exists())
        assert_same(remains(run_dir), uninterrupted, f"killed before change {at}")
        assert not list((run_dir / "checkpoints").glob(".*")), "unfinished checkpoints are removed"
        at += 1 if at < 6 else 17
    assert code == 0 and at > 50


def test_killed_process_resumes(world, tmp_path):
    """SIGKILL from outside, twice, at whatever moment it comes."""
    sections = SECTIONS | {"optimization": SECTIONS["optimization"] | {"num_steps": 30}}
    config = run_config(world, tmp_path / "killed" / "run", **sections)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(config))
    metrics = tmp_path / "killed" / "run" / "metrics.jsonl"
    for num_rows, arguments in ((3, []), (12, ["--resume"])):
        command = [sys.executable, "-m", "rlad", "train", str(tmp_path / "run.toml"), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and (
            not metrics.exists() or metrics.read_bytes().count(b"\n") < num_rows
        ):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
    rlad.train(config, resume=True)
    wanted = run_config(world, tmp_path / "whole" / "run", **sections)
    rlad.train(wanted)
    assert_same(
        remains(tmp_path / "killed" / "run"), remains(tmp_path / "whole" / "run"), "killed twice"
    )


def test_killed_at_random_moments_of_known_phases(world, tmp_path, monkeypatch):
    """The short form of `benchmarks/kills.py`."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    sections = SECTIONS | {"optimization": SECTIONS["optimization"] | {"num_steps": 24}}
    phases = ("generation", "update", "checkpoint writing")
    runs = kill_and_compare(
        lambda run_dir, seed: run_config(world, run_dir, **sections, seed=seed),
        tmp_path,
        phases=phases,
        seed=0,
    )
    kills = 0
    for number, fell, differing in runs:
        assert not differing, (number, fell, differing)
        kills += len(fell)
    assert kills == 3


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "eval.jsonl"])
@pytest.mark.parametrize("tail", [b'{"step": 6, "rew', b"\x00\x00\x00", b'{"step": 6}'])
def test_half_written_last_line_is_dropped(world, tmp_path, uninterrupted, stop_at, name, tail):
    config = run_config(world, tmp_path / "run", **SECTIONS)
    stop_at(40)
    with pytest.raises(StopRequested):
        rlad.train(config)
    with (tmp_path / "run" / name).open("ab") as file:
        file.write(tail)
    stop_at(-1)
    rlad.train(config, resume=True)
    assert_same(remains(tmp_path / "run"), uninterrupted, f"half a line in {name}")


# --- damaged --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "trainer/optimizer.safetensors", "trainer/state.json", "manifest.json"],
)
def test_a_damaged_checkpoint_costs_the_steps_behind_the_one_before(
    world, tmp_path, uninterrupted, name, caplog
):
    """It is named, passed over and kept; the run goes on from the one before and ends as the
    undamaged one does."""
    config = run_config(world, tmp_path / "run", **SECTIONS)
    rlad.train(config)
    last = RunDirectory(tmp_path / "run").checkpoint(6)
    content = bytearray((last / name).read_bytes())
    content[len(content) // 2] ^= 1
    (last / name).write_bytes(content)
    rlad.train(config, resume=True)
    (record,) = (record for record in caplog.records if record.name == "rlad.runs.directory")
    assert re.search(
        r"step-000006 is damaged: .*; it is skipped, and step-000003 taken", record.getMessage()
    )
    assert_same(remains(tmp_path / "run"), uninterrupted, name)
    assert (last.with_name("damaged-step-000006") / name).read_bytes() == content


# --- checkpoints by the clock ---------------------------------------------------------------------


def dies_in(config: dict[str, Any], method: str, *, at: int) -> bool:
    """Go on with a run in a fork that dies, as by SIGKILL, at the beginning of the `at`-th call of
    a method of the engine."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 137
    num_calls = 0
    original = getattr(NativeEngine, method)

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at:
            os._exit(137)
        return original(*args, **kwargs)

    setattr(NativeEngine, method, dying)
    code = 1
    try:
        rlad.train(config, resume=RunDirectory(Path(config["run_dir"])).exists())
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize(("every_seconds", "makes_progress"), [(1e-9, True), (600.0, False)])
def test_a_run_that_is_always_killed_before_its_second_update_gets_on(
    world, tmp_path, uninterrupted, monkeypatch, every_seconds, makes_progress
):
    """A session lives for one update or one rollout batch; without checkpoints in between,
    `every_steps` = 3 never comes."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = run_config(
        world, tmp_path / "run", **SECTIONS, checkpoints={"every_seconds": every_seconds}
    )
    num_sessions = 1
    while dies_in(config, "update", at=2) and num_sessions < 10:
        num_sessions += 1
    assert RunDirectory(tmp_path / "run").is_finished() is makes_progress
    if makes_progress:
        assert num_sessions == 6
        assert_same(remains(tmp_path / "run"), uninterrupted, "killed in every second update")


def test_rollouts_are_not_made_twice(world, tmp_path, uninterrupted, monkeypatch):
    """Killed before the first update, a run finds the rollouts again that the clock had written."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = run_config(world, tmp_path / "run", **SECTIONS, checkpoints={"every_seconds": 1e-9})
    assert dies_in(config, "update", at=1)
    assert RunDirectory(tmp_path / "run").newest_checkpoint()[1].name == "step-000000-rollouts"
    made: list[int] = []
    original = NativeEngine.make_rollout_batch
    monkeypatch.setattr(
        NativeEngine,
        "make_rollout_batch",
        lambda self, index: made.append(index) or original(self, index),
    )
    rlad.train(config, resume=True)
    assert made == [1, 2]
    assert_same(remains(tmp_path / "run"), uninterrupted, "killed before the first update")


# --- finished -------------------------------------------------------------------------------------


def test_resuming_a_finished_run_changes_nothing_and_reports_the_same(world, tmp_path):
    config = run_config(world, tmp_path / "run", **SECTIONS)
    first = rlad.train(config)
    before = {
        path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()
    }
    again = rlad.train(config, resume=True)
    assert (again.before, again.after, again.run_dir) == (first.before, first.after, first.run_dir)
    assert {
        path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()
    } == before


def test_more_steps_with_a_constant_schedule_equal_a_longer_run(world, tmp_path):
    short = run_config(world, tmp_path / "short" / "run", optimization={"num_steps": 4})
    long = run_config(world, tmp_path / "long" / "run", optimization={"num_steps": 8})
    rlad.train(short)
    short["optimization"]["num_steps"] = 8
    rlad.train(short, resume=True)
    rlad.train(long)
    found = remains(tmp_path / "short" / "run")
    wanted = remains(tmp_path / "long" / "run")
    for name in (
        "metrics.jsonl",
        "samples.jsonl",
        "step 8: model.safetensors",
        "step 8: trainer/optimizer.safetensors",
    ):
        assert found[name] == wanted[name], name
    assert rlad.load_config(tmp_path / "short" / "run").optimization.num_steps == 8


@pytest.mark.parametrize(
    ("schedule", "num_steps", "sentence"),
    [
        ("cosine", 8, "has a run with another config"),
        ("constant", 2, "has made 4 steps, but optimization.num_steps is 2"),
    ],
)
def test_another_number_of_steps_is_refused_where_it_means_another_run(
    world, tmp_path, schedule, num_steps, sentence
):
    config = run_config(world, tmp_path / "run", optimization={"schedule": schedule})
    rlad.train(config)
    config["optimization"]["num_steps"] = num_steps
    with pytest.raises(ValueError, match=sentence):
        rlad.train(config, resume=True)


def test_an_engine_is_closed_where_its_checkpoint_cannot_be_restored(
    world, tmp_path, monkeypatch
) -> None:
    config = run_config(world, tmp_path / "run", objective={"type": "grpo"})
    rlad.train(config)
    config["optimization"]["num_steps"] += 1
    closed: list[NativeEngine] = []

    def fail(self: NativeEngine, folder: Path, *, run_digest: str) -> None:
        raise UserError("it was trained with another teacher.")

    monkeypatch.setattr(NativeEngine, "restore", fail)
    monkeypatch.setattr(NativeEngine, "close", lambda self: closed.append(self))
    with pytest.raises(UserError, match="another teacher"):
        rlad.train(config, resume=True)
    assert len(closed) == 1


EPISODES: dict[str, Any] = {
    **SECTIONS,
    "rollout": {"prompts_per_batch": 4, "group_size": 3, "max_completion_tokens": 12},
    "optimization": SECTIONS["optimization"] | {"num_steps": 4, "tokens_per_batch": 100},
}


@pytest.mark.parametrize("objective", ["trrd", "skill_sd"])
def test_episodes_interrupted_at_any_safe_point(world, tmp_path, stop_at, monkeypatch, objective):
    # Without the process that an environment of the user's has, which takes a second to start.
    made = partial(InThisProcess, Adding, max_turn_tokens=3)
    monkeypatch.setattr(rlad.training.run, "make_task", lambda **options: made())
    sections = EPISODES | ({"objective": {"type": objective}} if objective != "trrd" else {})

    def config(name: str) -> dict[str, Any]:
        table = run_config(world, tmp_path / name / "run", **sections)
        table["task"] = {"type": "environment", "path": "tiny_environments:Adding"}
        if objective == "skill_sd":
            del table["teacher"]  # its own: the student, shown a skill
        return table

    stop_at(-1)
    rlad.train(config("whole"))
    total = StopAt.num_checks
    wanted = remains(tmp_path / "whole" / "run")
    assert bool(wanted["skills.jsonl"]) is (objective == "skill_sd")
    for at in range(total // 6, total, total // 4):
        stop_at(at)
        with pytest.raises(StopRequested):
            rlad.train(config(str(at)))
        stop_at(-1)
        rlad.train(config(str(at)), resume=True)
        assert_same(remains(tmp_path / str(at) / "run"), wanted, f"stopped at {at} of {total}")
