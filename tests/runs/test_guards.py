"""The guards: each speaks just beyond its limit and not just below it; steps that are not finite
are skipped exactly."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import rlad
import rlad.training.run
from parity_cases import make_case
from rlad.cli.train import print_summary
from rlad.config.run import RunConfig
from rlad.engines.native.loop import NativeEngine
from rlad.engines.rollout_batch import RolloutBatch
from rlad.errors import RunFailedError
from rlad.runs.directory import RunDirectory
from rlad.runs.guards import GUARDS, Guard, GuardWarning, Watch
from rlad.stopping import StopRequested
from rlad.tasks.base import Judgement, Verdict, require_reward_in_range
from rlad.tasks.logic import KnightsAndKnaves
from tiny_runs import remains, run_config

ROOT = Path(__file__).parents[2]
# Where a guard of a `change` or a `jump` starts from.
START = {
    "entropy_collapse": 0.4,
    "entropy_explosion": 0.4,
    "length_collapse": 50.0,
    "length_explosion": 50.0,
    "gradient_spikes": 0.2,
}
"""The metric in a healthy run, of the guards that compare with the start or the steps before."""
GATED = "the larger of objective/gated_positive/frac and objective/gated_negative/frac"
NUM_ROWS = 30


def config(**sections: Any) -> RunConfig:
    said = {
        "student": {"model": "tiny"},
        "teacher": {"model": "tiny"},
        "task": {"type": "knights_and_knaves"},
    }
    return RunConfig.model_validate(said | sections)


def columns(metric: str, value: float) -> dict[str, float]:
    """The metrics that give a guard's metric this value."""
    if metric == GATED:
        return {"objective/gated_positive/frac": value, "objective/gated_negative/frac": 0.0}
    if metric.startswith("size of "):
        return {metric.removeprefix("size of "): -value}
    if metric.startswith("dropped"):
        return {
            "objective/dropped_tokens/count": value * 1e6,
            "objective/trained_tokens/count": (1 - value) * 1e6,
        }
    return {metric.partition(",")[0]: value}


def rows_of(guard: Guard, figure: float) -> list[dict[str, float]]:
    """Steps of a run whose last ones have this figure, the others a healthy one."""
    usual = START.get(guard.name)
    if usual is None:
        return [
            {"step": step} | columns(guard.condition.metric, figure)
            for step in range(1, NUM_ROWS + 1)
        ]
    late = [usual] * 25 + [usual * figure] * 5
    return [
        {"step": step} | columns(guard.condition.metric, value)
        for step, value in enumerate(late, start=1)
    ]


def concerned(guard: Guard) -> RunConfig:
    """A run in which the guard's figure means something."""
    runs = (
        config(),
        config(student={"model": "tiny", "dtype": "bfloat16"}),
        config(objective={"type": "sft"}),
    )
    return next(run for run in runs if guard.concerns(run))


def said(rows: list[dict[str, float]], run: RunConfig | None = None) -> list[GuardWarning]:
    watch = Watch(run or config())
    return [warning for row in rows for warning in watch.see(row)]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_speaks_just_beyond_its_limit_once_and_alone(guard):
    away = 1e-6 if guard.condition.side == "above" else -1e-6
    limit = guard.condition.limit or 1e-9
    beyond = said(rows_of(guard, limit * (1 + away)), concerned(guard))
    assert [warning.name for warning in beyond] == [guard.name]
    assert (
        beyond[0].value == pytest.approx(limit * (1 + away), rel=1e-7)
        and beyond[0].limit == guard.condition.limit
    )
    assert said(rows_of(guard, guard.condition.limit * (1 - away)), concerned(guard)) == []


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_one_odd_step_says_nothing(guard):
    """But for those of which one step is wrong already: a skipped step, a sampler that computes
    something else."""
    is_immediate = guard.condition.says == "each step"
    odd = 1e3 if guard.condition.side == "above" else 0.0
    healthy = START.get(guard.name, guard.condition.limit)
    for at in (0, 12, NUM_ROWS - 1):
        rows = [
            {"step": i + 1} | columns(guard.condition.metric, odd if i == at else healthy)
            for i in range(NUM_ROWS)
        ]
        assert [warning.step for warning in said(rows, concerned(guard))] == (
            [at + 1] if is_immediate else []
        )


def test_a_step_without_the_metric_or_with_nan_is_no_step_of_its_window():
    rows: list[dict[str, float]] = [
        {"step": i + 1, "rollout/truncated/frac": 0.9} for i in range(4)
    ]
    assert said([*rows, {"step": 5}, {"step": 6, "rollout/truncated/frac": math.nan}]) == []
    assert [
        w.step for w in said([*rows, {"step": 5}, {"step": 6, "rollout/truncated/frac": 0.9}])
    ] == [6]


def test_guards_by_hand():
    lengths = [100, 100, 90, 110, 100, 60, 19, 19, 19, 30]
    rows = [
        {"step": i + 1, "rollout/completion_tokens/mean": value} for i, value in enumerate(lengths)
    ]
    (warning,) = said(rows)
    assert (warning.step, warning.name, warning.value) == (10, "length_collapse", 0.19)
    assert warning.message == (
        "completions have become much shorter than at the start: the student may answer without "
        "reasoning (rollout/completion_tokens/mean, median of 5 steps over that of the first 5 (at "
        "least 1): 0.19, limit 0.2); read samples.jsonl; if so, look for a reward without "
        "reasoning in the verifier, or set optimization.kl_coef."
    )
    norms = [0.1] * 10 + [0.3] * 10 + [2.1, 2.1, 2.1]
    assert [
        w.step
        for w in said(
            [{"step": i + 1, "optimization/gradient_norm": v} for i, v in enumerate(norms)]
        )
    ] == [23]


def test_what_a_guard_does_not_concern():
    variance = next(guard for guard in GUARDS if guard.name == "zero_variance")
    assert said(rows_of(variance, 1.0), config(objective={"type": "opd"})) == []
    gates = next(guard for guard in GUARDS if guard.name == "nearly_none_gated")
    assert said(rows_of(gates, 0.0), config(objective={"type": "grpo"})) == []
    ema = config(teacher={"type": "ema"})
    assert said(rows_of(gates, 0.0), ema) == [] and len(said(rows_of(gates, 0.0))) == 1


def test_the_docs_hold_the_table():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for guard in GUARDS:
        row = (
            f"| `{guard.name}` | {as_code(guard.condition.metric)} | {guard.condition.says} "
            f"| {guard.condition.side} {guard.condition.limit:g} |"
        )
        assert row in page


def as_code(metric: str) -> str:
    return f"`{metric}`" if " " not in metric else metric


# --- steps that are not finite --------------------------------------------------------------------


OPD: dict[str, Any] = {
    "objective": {"type": "opd"},
    "optimization": {"num_steps": 6, "learning_rate": 3e-3},
}


def weights(engine: NativeEngine) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.student.model.parameters()])


@pytest.mark.parametrize("what", ["loss", "gradient", "student"])
def test_a_skipped_step_moves_nothing_but_the_schedule(what):
    """Behind it the run is where it would be had that step's update not been: weights, moments, and
    what follows."""
    run = {
        "optimization": {
            "num_steps": 4,
            "schedule": "linear",
            "weight_decay": 0.1,
            "learning_rate": 1e-2,
        }
    }
    skips, leaves_out = (make_case("opd", dtype=torch.float32, **run).engine for _ in range(2))
    for step in range(4):
        batch = skips.make_rollout_batch(step)
        same = leaves_out.make_rollout_batch(step)
        if step == 2:
            before = weights(skips)
            metrics = overflow(skips, batch, what)
            assert metrics["optimization/skipped/count"] == 1
            assert ("optimization/loss" in metrics) == (what == "gradient")
            assert all(map(math.isfinite, metrics.values()))
            assert torch.equal(weights(skips), before)
            leaves_out.scheduler.step()
        else:
            assert skips.update(batch, range(4))["optimization/skipped/count"] == 0
            leaves_out.update(same, range(4))
        skips.step = leaves_out.step = step + 1
        assert torch.equal(weights(skips), weights(leaves_out)), step
    for mine, theirs in zip(
        skips.optimizer.state.values(), leaves_out.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def overflow(engine: NativeEngine, batch: RolloutBatch, what: str) -> dict[str, float]:
    """An update whose loss, whose gradient alone, or whose student's log-probs are not finite."""
    if what == "student":
        head: Any = engine.student.model.get_output_embeddings()
        before = head.weight.data
        head.weight.data = torch.full_like(head.weight, 1e38)
        metrics = engine.update(batch, range(4))
        head.weight.data = before
        return metrics
    if what == "loss":
        assert batch.teacher_logprobs is not None
        batch.teacher_logprobs = [torch.full_like(row, -3e38) for row in batch.teacher_logprobs]
        return engine.update(batch, range(4))
    hook = engine.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    metrics = engine.update(batch, range(4))
    hook.remove()
    return metrics


def test_a_run_with_a_skipped_step_says_so_and_goes_on(world, tmp_path, poison):
    heard: list[GuardWarning] = []

    class Hears(rlad.training.reporter.Reporter):
        def warned(self, warning: GuardWarning) -> None:
            heard.append(warning)

    poison(3, 5)
    result = rlad.train(run_config(world, tmp_path / "run", **OPD), reporter=Hears())
    run = RunDirectory(tmp_path / "run")
    rows = list(run.read("metrics.jsonl"))
    assert [row["optimization/skipped/count"] for row in rows] == [0, 0, 1, 0, 1, 0]
    assert ["optimization/loss" in row for row in rows] == [True, True, False, True, False, True]
    skipped = [warning for warning in heard if warning.name == "skipped_steps"]
    assert [(warning.step, warning.value) for warning in skipped] == [(3, 1.0)], "once in a run"
    assert list(run.read("warnings.jsonl")) == [warning.to_json() for warning in heard]
    assert {path.name for path in run.path.glob("skipped-*")} == {
        f"skipped-step-00000{step}.{kind}" for step in (3, 5) for kind in ("jsonl", "safetensors")
    }
    with Console(file=io.StringIO()) as console, console.capture() as capture:
        print_summary(console, result)
    assert (
        f"rlad doctor {run.path}\n    there were warnings: " in capture.get()
        and "skipped steps" in capture.get()
    )
    scores = load_file(run.path / "skipped-step-000003.safetensors")
    groups = [
        json.loads(line)
        for line in (run.path / "skipped-step-000003.jsonl").read_text().splitlines()
    ]
    assert len(groups) == 4 and groups[0]["problem_index"] == 8, "the third batch of four problems"
    num_tokens = sum(
        len(r["completion"]["token_ids"]) for group in groups for r in group["rollouts"]
    )
    assert torch.equal(scores["teacher_logprobs"], torch.full((num_tokens,), -3e38))


def test_several_in_a_row_stop_the_run_which_then_goes_on(world, tmp_path, poison):
    poison(2, 3, 4)
    config = run_config(world, tmp_path / "run", **OPD)
    config["optimization"]["max_skipped_steps"] = 2
    with pytest.raises(
        RunFailedError, match="step 3: loss or gradient was not finite in 2 steps in a row"
    ):
        rlad.train(config)
    run = RunDirectory(tmp_path / "run")
    assert [step for step, _ in run.checkpoints()][-1] == 3
    assert (run.path / "skipped-step-000002.jsonl").is_file() and (
        run.path / "skipped-step-000003.safetensors"
    ).is_file()
    with pytest.raises(RunFailedError, match=r"step 4: .* in 3 steps in a row"):
        rlad.train(config, resume=True)
    assert len(list(run.path.glob("skipped-*.jsonl"))) == 2, "no more than may be skipped in a row"
    rlad.train(config, resume=True)
    assert [row["optimization/skipped/count"] for row in run.read("metrics.jsonl")] == [
        0,
        1,
        1,
        1,
        0,
        0,
    ]
    wanted = run_config(world, tmp_path / "patient" / "run", **OPD)
    wanted["optimization"]["max_skipped_steps"] = 9
    rlad.train(wanted)
    found = remains(run.path)
    expected = remains(tmp_path / "patient" / "run")
    for name in (
        "metrics.jsonl",
        "samples.jsonl",
        "step 6: model.safetensors",
        "step 6: trainer/optimizer.safetensors",
    ):
        assert found[name] == expected[name], name
    assert (run.path / "warnings.jsonl").read_bytes() == (
        tmp_path / "patient" / "run" / "warnings.jsonl"
    ).read_bytes()


def test_a_run_stopped_behind_a_skipped_step_counts_on(world, tmp_path, poison):
    """Two skipped steps with an interruption in between are two in a row."""

    class StopBehind(rlad.training.reporter.Reporter):
        def warned(self, warning: GuardWarning) -> None:
            raise StopRequested(2)

    poison(2, 3)
    config = run_config(world, tmp_path / "run", **OPD)
    config["optimization"]["max_skipped_steps"] = 2
    with pytest.raises(StopRequested):
        rlad.train(config, reporter=StopBehind())
    with pytest.raises(RunFailedError, match=r"step 3: .* in 2 steps in a row"):
        rlad.train(config, resume=True)


# --- rewards --------------------------------------------------------------------------------------


def test_a_reward_out_of_range_names_the_verifier():
    exact = KnightsAndKnaves()
    logic_rl = KnightsAndKnaves(reward="logic_rl")
    for task, good, bad in (
        (exact, 1.0, 1.001),
        (exact, 0.0, -0.001),
        (logic_rl, 3.0, 3.1),
        (logic_rl, -3.0, math.inf),
    ):
        require_reward_in_range(task, Judgement(Verdict.CORRECT, good), "training problem 7")
        with pytest.raises(
            RunFailedError,
            match=r"the task knights_and_knaves gave reward .* for training problem 7",
        ):
            require_reward_in_range(task, Judgement(Verdict.CORRECT, bad), "training problem 7")
    with pytest.raises(RunFailedError, match="gave reward nan"):
        require_reward_in_range(exact, Judgement(Verdict.WRONG, math.nan), "training problem 7")
    require_reward_in_range(exact, Judgement(Verdict.CANNOT_JUDGE, math.nan), "training problem 7")
