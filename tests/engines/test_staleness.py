"""`rollout.max_staleness = 1`: each rollout batch is written while the one before it trains, by the
weights of before that one's updates; the gradient is that of a stale batch made by hand."""

import copy
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad
from copied_samplers import AHEAD, CopySampler
from rlad.config.file import parse_config
from rlad.engines.metrics import TokenStats
from rlad.engines.native import batches, make_engine
from rlad.engines.native.loop import NativeEngine
from rlad.engines.rollout_batch import RolloutBatch
from rlad.errors import RunFailedError
from rlad.models.student import load_student
from rlad.rollouts.sampling import sample
from rlad.runs.directory import RunDirectory
from rlad.scoring.scorer import Scorer
from rlad.seeds import stream_seed
from rlad.stopping import StopRequested
from rlad.tasks import make_task
from tiny_runs import StopAt, run_config

TEMPERATURE = 0.8
SIZES = {"prompts_per_batch": 4, "group_size": 6, "max_completion_tokens": 5}


@pytest.fixture(autouse=True)
def copies_take_the_place_of_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "make_sampler", CopySampler)


@contextmanager
def engine_of(world: Path, **sections: Any) -> Iterator[NativeEngine]:
    sections.setdefault("objective", {"type": "grpo"})
    rollout = {**SIZES, **AHEAD, "temperature": TEMPERATURE} | sections.pop("rollout", {})
    loop_settings = {"learning_rate": 0.05, "num_steps": 6} | sections.pop("optimization", {})
    config = parse_config(
        run_config(world, Path("unused"), rollout=rollout, optimization=loop_settings, **sections)
    )
    with closing(make_task(**config.task.model_dump())) as task:
        engine = make_engine(config, load_student(config), task, before_work=lambda: None)
        with closing(engine):
            yield engine


def gradient(engine: NativeEngine, batch: RolloutBatch) -> list[Tensor]:
    engine.accumulate_gradient(batch, range(len(batch.rollouts)), TokenStats())
    return [parameter.grad.clone() for parameter in engine.parameters if parameter.grad is not None]


def stale_batch(engine: NativeEngine) -> tuple[Any, RolloutBatch]:
    """Train on the first batch; return the student of before that, and the second batch."""
    before = replace(engine.student, model=copy.deepcopy(engine.student.model))
    next(engine.steps())
    return before, engine.make_rollout_batch(1)


def test_the_gradient_of_grpo_is_that_of_a_stale_batch_by_hand(world) -> None:
    """In one step on a batch the ratio to the old policy is 1: what is left are the importance
    weights min(π1 / π0, 2) of the tokens that π0 wrote."""
    with engine_of(world) as engine:
        before, batch = stale_batch(engine)
        found = gradient(engine, batch)
        # The second batch is what the student of before the first update writes.
        written = sample(
            before,
            [group.prompt_token_ids for group in batch.groups],
            group_size=SIZES["group_size"],
            max_completion_tokens=SIZES["max_completion_tokens"],
            temperature=TEMPERATURE,
            seed=stream_seed(engine.config.seed, "rollouts", 1),
        )
        completions = [one for group in written for one in group]
        assert [one.completion for one in batch.rollouts] == completions

        model = engine.student.model
        model.zero_grad()
        advantages = batch.advantages.float()
        losses = []
        num_bounded = 0
        for prompt, ids, one, advantage in zip(
            batch.prompts, batch.completions, batch.rollouts, advantages, strict=True
        ):
            tokens = torch.tensor([[*prompt, *ids]])
            logits = model(tokens).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
            ours = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
            weights = (ours.detach() - torch.tensor(one.completion.logprobs)).exp()
            num_bounded += int((weights > 2).sum())
            losses.append(-(weights.clamp(max=2) * advantage * ours).mean())
        torch.stack(losses).mean().backward()
    assert num_bounded > 3
    for mine, parameter in zip(found, engine.parameters, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", ["trrd", "opd", "kdrl", "topd", "distilled_rl"])
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask", "none"])
def test_every_objective_takes_its_old_logprobs_when_it_trains(world, objective, mode) -> None:
    """The same as a batch whose old log-probs were scored by hand, by the student that is
    trained."""
    correction = {"mode": mode, "clip_max": 3.0}
    with engine_of(
        world, objective={"type": objective}, rollout={"correction": correction}
    ) as engine:
        before, batch = stale_batch(engine)
        scorer = Scorer(engine.student, temperature=TEMPERATURE, tokens_per_batch=512)
        old = scorer.score(batch.prompts, batch.completions)
        stale = Scorer(before, temperature=TEMPERATURE, tokens_per_batch=512)
        sampled = stale.score(batch.prompts, batch.completions)
        for values, one in zip(sampled, batch.rollouts, strict=True):
            logprobs = torch.tensor(one.completion.logprobs)
            torch.testing.assert_close(values, logprobs, atol=1e-5, rtol=0)
        assert max(float((a - b).abs().max()) for a, b in zip(old, sampled, strict=True)) > 0.1
        found = gradient(engine, batch)
        trained = set(batch.training_rows)
        kept = [values if i in trained else torch.empty(0) for i, values in enumerate(old)]
        by_hand = replace(batch, old_logprobs=kept)
        engine.choose_what_trains(by_hand)
        wanted = gradient(engine, by_hand)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_batches_are_as_old_as_they_say(world) -> None:
    for per_batch, wanted in ((1, [0, 1, 1, 1, 1, 1]), (2, [0, None, 2, None, 2, None])):
        with engine_of(world, optimization={"steps_per_rollout_batch": per_batch}) as engine:
            rows = [result.metrics for result in engine.steps()]
            assert [row.get("rollout/staleness/steps") for row in rows] == wanted
            sampler: Any = engine.sampler
            assert sampler.num_hand_overs == 6 // per_batch - 1
            assert engine.begun_at is None
        mismatch = [row.get("sampler/mismatch/mean", 0.0) for row in rows]
        assert mismatch[0] < 1e-5 < max(mismatch)


def test_a_batch_that_has_come_outlives_a_server_that_ends_then(world, monkeypatch) -> None:
    """A checkpoint of the run, which stops, holds it."""

    def fail(*_: Any, **__: Any) -> None:
        raise RunFailedError("no vLLM server takes the weights.")

    with engine_of(world) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine.sampler, "begin", fail)
            with pytest.raises(RunFailedError, match="takes the weights"):
                next(engine.steps())
        assert engine.pending is not None and engine.resume_point == "rollouts"
        groups = engine.pending.groups
        assert next(engine.steps()).groups == groups
        assert engine.begun_at == 0


def test_an_evaluation_between_leaves_what_was_begun_as_it_is(world, tmp_path) -> None:
    """Held-out problems are completed by the student as it is, the batch by that of before."""
    with engine_of(world) as engine, engine_of(world) as other:
        _, wanted = stale_batch(engine)
        next(other.steps())
        prompts = [list(group.prompt_token_ids) for group in wanted.groups]
        settings: dict[str, Any] = {"group_size": 2, "max_completion_tokens": 5}
        written = other.sampler.sample(prompts, **settings, temperature=TEMPERATURE, seed=5)
        asked = sample(other.student, prompts, **settings, temperature=TEMPERATURE, seed=5)
        assert written == asked
        found = other.make_rollout_batch(1)
        assert found.groups == wanted.groups


def test_a_resumed_run_writes_again_what_was_begun(world, tmp_path, monkeypatch) -> None:
    """Between two batches nothing of the begun one is kept: it is written by the student as it is,
    and 0 steps old. A batch that was complete is kept."""
    rollout = {**SIZES, **AHEAD, "temperature": TEMPERATURE}
    objective = {"type": "grpo"}
    optimization = {"num_steps": 6, "learning_rate": 0.05}
    config = run_config(
        world, tmp_path / "run", rollout=rollout, optimization=optimization, objective=objective
    )
    ages = []
    for at in range(20, 400, 37):
        monkeypatch.setattr("rlad.training.run.Stop", lambda at=at: StopAt(at))
        run_dir = tmp_path / f"run-{at}"
        resumed = config | {"run_dir": str(run_dir)}
        try:
            rlad.train(resumed)
        except StopRequested:
            monkeypatch.undo()
            monkeypatch.setattr(batches, "make_sampler", CopySampler)
            rlad.train(resumed, resume=run_dir.exists())
        rows = list(RunDirectory(run_dir).read("metrics.jsonl"))
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        ages.append(tuple(row["rollout/staleness/steps"] for row in rows))
        assert rows[0]["rollout/staleness/steps"] == 0 and sum(ages[-1]) in (4, 5)
    assert len(set(ages)) > 1
