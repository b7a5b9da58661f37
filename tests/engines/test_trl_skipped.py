"""Steps that are not finite with `[engine] type = "trl"`: skipped, counted and kept as by the native engine."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.trl
pytest.importorskip("trl", reason="needs the optional package trl")

import rlad  # noqa: E402
import rlad.training.run  # noqa: E402
from rlad.errors import RunFailedError  # noqa: E402
from rlad.runs.directory import RunDirectory  # noqa: E402
from tiny_runs import run_config, write_config  # noqa: E402

SECTIONS: dict[str, Any] = {
    "objective": {"type": "opd"},
    "rollout": {"max_completion_tokens": 6, "temperature": 0.7},
    "optimization": {"tokens_per_batch": 60, "max_grad_norm": 0.5, "learning_rate": 1e-2, "schedule": "linear"},
    "evaluation": {"every_steps": 1},
    "checkpoints": {"keep_last": 9},
}
SKIPPED, LOSS, NORM = "optimization/skipped/count", "optimization/loss", "optimization/gradient_norm"


def config_of(world: Path, run_dir: Path, engine: str = "trl", **optimization: Any) -> dict[str, Any]:
    sections = SECTIONS | {"optimization": SECTIONS["optimization"] | optimization}
    return run_config(world, run_dir, engine={"type": engine}, **sections)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return list(RunDirectory(run).read("metrics.jsonl"))


def saved(run: Path, step: int) -> list[torch.Tensor]:
    """The weights and the optimiser's moments behind a step."""
    folder = RunDirectory(run).checkpoint(step)
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    weights = load_file(folder / "model.safetensors")
    return [weights[name] for name in sorted(weights)] + [value for of_one in moments.values() for value in of_one.values()]


def are_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_skipped_step_moves_nothing_and_the_run_is_that_of_the_native_engine(world, tmp_path, poison):
    poison(3)
    for engine in ("native", "trl"):
        rlad.train(config_of(world, tmp_path / engine, engine, num_steps=5))
    native, ours = rows_of(tmp_path / "native"), rows_of(tmp_path / "trl")
    assert [row[SKIPPED] for row in ours] == [0, 0, 1, 0, 0]
    for a, b in zip(ours, native, strict=True):
        assert b.keys() - a.keys() <= {"time/old_logprobs/seconds", "time/reference/seconds"}
        for key in (key for key in b if key in a and not key.startswith(("time/", "memory/"))):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5), (b["step"], key)
    assert LOSS not in ours[2] and all(math.isfinite(value) for row in ours for value in row.values())
    assert not are_equal(saved(tmp_path / "trl", 1), saved(tmp_path / "trl", 2)), "the comparison can fail"
    assert are_equal(saved(tmp_path / "trl", 2), saved(tmp_path / "trl", 3))
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / engine).glob("skipped-*.jsonl")} for engine in ("native", "trl")
    ]
    assert list(files[0]) == ["skipped-step-000003.jsonl"] and files[0].keys() == files[1].keys()
    native_scores, scores = (load_file(tmp_path / engine / "skipped-step-000003.safetensors") for engine in ("native", "trl"))
    assert scores.keys() == native_scores.keys()
    for name, values in native_scores.items():
        torch.testing.assert_close(scores[name].to(values), values)


def test_several_in_a_row_stop_the_run_which_then_goes_on(world, tmp_path, poison):
    poison(2, 3, 4)
    config = config_of(world, tmp_path / "run", num_steps=5)
    with pytest.raises(RunFailedError, match="step 4: loss or gradient was not finite in 3 steps in a row"):
        rlad.train(config)
    assert RunDirectory(tmp_path / "run").checkpoints()[-1][0] == 4
    assert are_equal(saved(tmp_path / "run", 1), saved(tmp_path / "run", 4))
    rlad.train(config, resume=True)
    assert [row[SKIPPED] for row in rows_of(tmp_path / "run")] == [0, 1, 1, 1, 0]
    patient = config_of(world, tmp_path / "patient", num_steps=5, max_skipped_steps=9)
    rlad.train(patient)
    assert are_equal(saved(tmp_path / "run", 5), saved(tmp_path / "patient", 5))


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(world, tmp_path):
    """Twice in a row, which stops the run: all stop at one place, and there is a checkpoint of it."""
    config = config_of(world, tmp_path / "run", num_steps=4, max_skipped_steps=2)
    path = write_config(tmp_path / "run.toml", config | {"evaluation": config["evaluation"] | {"every_steps": 1}})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(Path(__file__).parents[1] / "poisoned.py"), str(path), "2", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1 and "step 3: loss or gradient was not finite in 2 steps in a row" in done.stderr
    assert [row[SKIPPED] for row in rows_of(tmp_path / "run")] == [0, 1, 1]
    assert are_equal(saved(tmp_path / "run", 1), saved(tmp_path / "run", 3))
    kept = map(json.loads, (tmp_path / "run" / "skipped-step-000002.jsonl").read_text().splitlines())
    lengths = [len(rollout["completion"]["token_ids"]) for group in kept for rollout in group["rollouts"]]
    scores = load_file(tmp_path / "run" / "skipped-step-000002.safetensors")
    assert scores["teacher_logprobs/lengths"].tolist() == lengths and len(lengths) == len(scores["advantages"]) == 12
    first, second = scores["teacher_logprobs"].split([sum(lengths[:6]), sum(lengths[6:])])
    assert (first > -100).all() and (second < -1e38).all(), "each rank's own, in the order of the ranks"


def test_a_first_step_that_is_skipped(world, tmp_path, poison):
    """There are no moments yet."""
    poison(1)
    rlad.train(config_of(world, tmp_path / "run", num_steps=2))
    assert [row[SKIPPED] for row in rows_of(tmp_path / "run")] == [1, 0]
    weights = [load_file(RunDirectory(tmp_path / "run").checkpoint(step) / "model.safetensors") for step in (0, 1, 2)]
    name = "model.embed_tokens.weight"
    assert torch.equal(weights[0][name], weights[1][name]) and not torch.equal(weights[1][name], weights[2][name])


def sabotage(monkeypatch: pytest.MonkeyPatch, attack: Callable[[Any], None]) -> None:
    """`attack` has the engine of the next run."""
    make_engine = rlad.training.run.make_engine

    def make(*args: Any, **kwargs: Any) -> Any:
        engine = make_engine(*args, **kwargs)
        attack(engine)
        return engine

    monkeypatch.setattr(rlad.training.run, "make_engine", make)


@pytest.mark.parametrize("factor", [math.nan, 1e30], ids=["NaN", "a norm that overflows"])
def test_a_gradient_that_is_not_finite(world, tmp_path, monkeypatch, factor):
    """Clipping makes zeros of finite gradients whose norm is infinite: moments would move by them."""

    def attack(engine: Any) -> None:
        weight = next(engine.student.model.parameters())
        weight.register_hook(lambda gradient: gradient * (factor if engine.step == 2 else 1.0))

    sabotage(monkeypatch, attack)
    rlad.train(config_of(world, tmp_path / "run", num_steps=3))
    rows = rows_of(tmp_path / "run")
    assert [row[SKIPPED] for row in rows] == [0, 0, 1] and [NORM in row for row in rows] == [True, True, False]
    assert math.isfinite(rows[2][LOSS]) and are_equal(saved(tmp_path / "run", 2), saved(tmp_path / "run", 3))


def test_log_probs_of_the_student_that_are_not_finite(world, tmp_path, monkeypatch):
    """With sound weights the batch is to blame; tokens that the student cannot score do not just leave the loss."""

    def attack(engine: Any) -> None:
        def spoil(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
            return output * (math.nan if engine.step == 2 and module.training else 1.0)

        engine.student.model.model.norm.register_forward_hook(spoil)

    sabotage(monkeypatch, attack)
    rlad.train(config_of(world, tmp_path / "run", num_steps=4))
    rows = rows_of(tmp_path / "run")
    assert [row[SKIPPED] for row in rows] == [0, 0, 1, 0] and LOSS not in rows[2]
    assert are_equal(saved(tmp_path / "run", 2), saved(tmp_path / "run", 3))


def test_broken_weights_stop_the_run_at_once(world, tmp_path, monkeypatch):
    def attack(engine: Any) -> None:
        ask = engine.teacher.logprobs

        def logprobs(requests: Any) -> Any:
            if engine.step == 2:
                next(engine.student.model.parameters()).data.fill_(math.nan)
            return ask(requests)

        engine.teacher.logprobs = logprobs

    sabotage(monkeypatch, attack)
    with pytest.raises(RunFailedError, match="step 3: the student's own log-probs are not finite; its weights are broken"):
        rlad.train(config_of(world, tmp_path / "run", num_steps=4))
